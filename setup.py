"""Metadata of the package; pyproject.toml holds the build system and the tools' settings only."""

from setuptools import find_packages, setup

setup(
    name="gemma_jax",
    version="0.1.0",
    description="Gemma in JAX: pretrain, plan, convert and sample on TPUs, GPUs and CPU meshes",
    url="https://github.com/OWNER/gemma_jax",  # `make address` sets it here, in README.md and in the notebook
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["gemma_jax", "gemma_jax.*"]),
    package_data={"gemma_jax.weights": ["native.cc"]},
    install_requires=[
        "array_record>=0.8",
        "etils[epath]>=1.13",
        "flax>=0.12.8",
        "gguf>=0.17",
        "grain>=0.2.18",
        "huggingface_hub>=2.4",
        "jax>=0.10",
        "matplotlib>=3.10",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pyarrow>=18",
        "rich>=13",
        "sentencepiece[protobuf]>=0.2.3",
        "tensorboardX>=2.6",
        "tensorflow-datasets>=4.9.10",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda13": ["jax[cuda13]"],  # drivers from 580 on
        "cuda12": ["jax[cuda12]"],  # drivers from 525 on
        # XLA's compiler for GPUs, for `gemma plan` on a machine without one; its version must be that of jax.
        "gpu-compiler": ["jax-cuda13-pjrt", "jax-cuda13-plugin", "nvidia-cuda-nvcc", "nvidia-nvvm"],
        "data": ["gcsfs", "s3fs"],
        "kaggle": ["kagglehub"],
        "test": ["hypothesis", "import-linter", "mypy", "pytest", "pytest-xdist", "ruff"],
        "test-slow": ["flask", "flask-cors", "moto[s3]", "s3fs"],  # S3 on this machine
    },
    entry_points={"console_scripts": ["gemma = gemma_jax.cli:main"]},
)
