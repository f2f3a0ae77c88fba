"""Installs the library (lcx, pallas_kernels) with its configs and programs."""

from setuptools import find_packages, setup

setup(
    name="lcx",
    version="0.1.0",
    description="Long-context methods as composable parts of one sharded JAX model, trainer and evaluation suite",
    packages=find_packages(include=["lcx*", "pallas_kernels*", "configs*", "experiments*"]),
    package_data={"lcx": ["assets/*/*"]},
    python_requires=">=3.11,<3.14",
    install_requires=[
        "absl-py>=2.1",
        "fiddle>=0.3",
        "flax>=0.12,<0.14",
        "grain>=0.2.12",
        "jax>=0.10,<0.13",
        "jaxtyping>=0.3",
        "jinja2>=3.1",
        "libcst>=1.0",  # fiddle's absl flags import it
        "matplotlib>=3.8",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.20",
        "rich>=13",
        "safetensors>=0.8",
        "tensorboard>=2.16",
        "tensorstore>=0.1.60",
        "tokenizers>=0.20",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10,<0.13"],
        "cuda": ["jax[cuda12]>=0.10,<0.13"],
        "eval": ["lm-eval>=0.4.5"],
        "serve": ["starlette>=0.40", "uvicorn>=0.30"],
        "dev": [
            "beartype>=0.18",
            "httpx>=0.27",
            "hypothesis>=6.100",
            "pytest>=8",
            "pytest-xdist>=3.5",
            "ruff>=0.8",
            "starlette>=0.40",
        ],
        "oracles": ["torch>=2.13,<2.15", "transformers>=5,<6"],
    },
)
