"""`python -m r1jax.plan`: does this RL loop fit that pod, and how fast is it? Compiled ahead of time, no TPU needed."""
