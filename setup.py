"""Packaging of megatron_asvr; ``pip install .`` needs no flags."""

from setuptools import find_packages, setup

setup(
    name="megatron_asvr",
    version="0.1.0",
    description="Train vision-language models with autoregressive semantic visual reconstruction",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_asvr", "megatron_asvr.*"]),
    package_data={
        "megatron_asvr": [
            "config/presets/*.yaml",
            "platforms/*.cpp",
            "platforms/*.txt",
            "recipes/*.j2",
        ]
    },
    install_requires=[
        "torch>=2.6",
        "numpy",
        "packaging",
        # 0.17 and later declare Python >= 3.12; the platform layer runs both.
        'megatron-core==0.16.1; python_version < "3.12"',
        'megatron-core==0.19.2; python_version >= "3.12"',
        "psutil",  # megatron-core's checkpoint writer needs it undeclared
        "einops",
        "fsspec",  # data behind URLs
        "pyarrow",  # Parquet sources and the index of a data set
        "nvidia-dali-cuda130==2.4.0",
        "pillow",
        "pyyaml",
        "safetensors",
        "sentencepiece",
        "tokenizers",
        "jinja2>=3.1.6",  # earlier ones have holes in the sandbox of chat templates
        "transformers>=5.23",
        "matplotlib",
        "rich",
        "wandb",
    ],
    extras_require={
        # The newest one that both megatron-cores were held against: tests/unit/test_apis.py.
        "gpu": ["transformer-engine[core-cu13,pytorch]==2.20.2"],
        "mpi": ["mpi4py", "mpich"],
        "remote": ["aiohttp", "gcsfs", "s3fs"],  # https://, gs:// and s3:// for fsspec
        # The suite of benchmarks. `make setup-eval` installs just these; pip adds what lmms-eval
        # declares for its other tasks, another build of torch and an older wandb among it.
        "eval": [
            "lmms-eval==0.7.3",
            "accelerate==1.15.0",
            "colorama==0.4.6",
            "datasets==5.2.0",
            "dill==0.4.1",
            "evaluate==0.4.6",
            "loguru==0.7.3",
            "lxml==6.1.3",
            "multiprocess==0.70.19",
            "pandas==3.1.1",
            "portalocker==4.4.2",
            "pytz==2026.6",
            "sacrebleu==2.6.0",
            "tabulate==0.10.0",
            "tenacity==9.2.1",
        ],
        "dev": ["pytest", "pytest-xdist", "ruff", "mypy", "pre-commit"],
        "quickstart": ["easy-vqa==1.0"],
        "smollm2": ["accelerate", "gguf"],  # real weights to verify conversions with
    },
    entry_points={"console_scripts": ["asvr=megatron_asvr.cli.main:main"]},
)
