"""r1jax: the system that trains DeepSeek-R1, in JAX for TPU pods."""

__version__ = "0.1.0"
