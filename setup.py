"""Packaging of llamafactory-ddm: a plugin that adds diffusion language models to an unmodified LLaMA-Factory."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def _version() -> str:
    for line in (ROOT / "src" / "llamafactory_ddm" / "_version.py").read_text(encoding="utf-8").splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise RuntimeError("src/llamafactory_ddm/_version.py holds no __version__ line")


setup(
    name="llamafactory-ddm",
    version=_version(),
    description="Diffusion language models for LLaMA-Factory: adapt, train and sample them from YAML.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"llamafactory_ddm": ["py.typed", "generation/*.html"]},
    install_requires=[
        # LLaMA-Factory imports torchaudio, whose 2.11.0 refuses another torch.
        "torch>=2.5,<2.12",
        # 2.11.1 asks for torch >= 2.11, but cannot be loaded under it (undefined symbol).
        "torchaudio>=2.5,<2.11.1",
        "llamafactory>=0.9.4,<0.9.7",
        # 5.6.0 has a broken FlashAttention-2 path.
        "transformers>=4.57,!=5.6.0",
        "safetensors>=0.4",
        "huggingface_hub>=0.30",
        "rich>=13.7,<16",
        # Serving: samples that wait for a joint forward pass, and /metrics.
        "greenlet>=3.1,<4",
        "prometheus-client>=0.20,<1",
    ],
    entry_points={
        # torch >= 2.5 calls this at the end of its import, in every process.
        "torch.backends": ["llamafactory_ddm = llamafactory_ddm._autoload:activate"],
        "console_scripts": ["llamafactory-ddm = llamafactory_ddm.cli.main:main"],
    },
    extras_require={
        # Earlier ones fail without a GPU under torch 2.11.
        "deepspeed": ["deepspeed>=0.19.8,<0.20"],
        # Built with CUDA against the torch that is installed, which needs pip's --no-build-isolation.
        "flash-attn": ["flash-attn>=2.7.3,<3"],
        # Earlier ones cannot quantise without a GPU.
        "qlora": ["bitsandbytes>=0.49,<0.51"],
        # `default` has the server that LLaMA-Factory asks for the nodes of the cluster.
        "ray": ["ray[default,train]>=2.40,<3"],
        # Filters before `prepare-data`, for English; datatrove's own extras are for all languages and sources. Its
        # hashes of strings fail under xxhash 4.
        "datatrove": ["datatrove>=0.10.1,<0.11", "orjson", "regex", "spacy>=3.8,<4", "xxhash<4"],
        # ROUGE of generated texts, and lm-evaluation-harness.
        "eval": ["rouge-score>=0.1.2", "lm-eval>=0.4.13,<0.5"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "ruff>=0.8",
            "mypy>=1.11",
            "import-linter>=2.1",
            "types-PyYAML",
            "tensorboard>=2.15",
            "build>=1.2",
            "rouge-score>=0.1.2",
            "lm-eval>=0.4.13,<0.5",
            # A browser for the web pages; Chromium is the system's.
            "playwright>=1.49",
            # OpenAI's client, against the API.
            "openai>=1.60",
            "httpx>=0.27",
        ],
    },
    classifiers=[
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
