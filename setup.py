"""Packaging. `pip install -e .[test]` for work on the code."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="minisft",
    version="0.1.0",
    description="Supervised fine-tuning of Llama-3, from scratch in pure PyTorch",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["minisft", "minisft.*"]),
    package_data={"minisft": ["*.toml", "recipes/*.toml", "recipes/sample/*.jsonl", "data/*.toml", "demo/*.tsv",
                              "demo/*.toml", "model/*.toml", "evals/*.toml", "evals/*.html",
                              "evals/question_files/*.jsonl", "reports/*.css", "reports/*.mplstyle", "export/*.md"]},
    install_requires=["torch>=2.11", "tokenizers>=0.22", "safetensors>=0.6", "numpy>=2", "tqdm>=4.66"],
    extras_require={
        "plot": ["matplotlib>=3.9"],  # minisft report
        "parquet": ["pyarrow>=15"],  # data in Parquet, Arrow, Feather
        "tensorboard": ["tensorboard>=2.18"],  # minisft report --tensorboard
        "test": ["pytest>=8", "pytest-xdist>=3", "hypothesis>=6", "transformers>=5", "llama-models==0.3.*",
                 "ruff>=0.12", "mypy>=2", "matplotlib>=3.9", "tensorboard>=2.18", "peft>=0.17", "bitsandbytes>=0.48",
                 "pyarrow>=15"],
        # torchao: the last version with what torchtune 0.6.1 imports
        "bench": ["trl==1.16.*", "transformers>=5", "torchtune==0.6.1", "torchao==0.10.*", "lm_eval==0.4.*"],
        # Needs older Hugging Face libraries than TRL's newest: install it in its own environment.
        "bench-litgpt": ["litgpt==0.5.*"],
    },
    entry_points={"console_scripts": ["minisft = minisft.__main__:main"]},
)
