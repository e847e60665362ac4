# megatron_ove on top of an image that already holds torch, CUDA, NCCL and Transformer Engine.
#   docker build -t megatron_ove .
#   docker run --gpus all --ipc=host -v /data:/data megatron_ove megatron-ove train /data/run.yaml
# Any base with Python 3.11 or 3.12 works; without a GPU the same code runs on CPU.
ARG BASE=nvcr.io/nvidia/pytorch:25.11-py3
# hadolint ignore=DL3006
FROM ${BASE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /opt/megatron_ove
COPY setup.py pyproject.toml README.md ./
COPY megatron_ove ./megatron_ove
COPY tools ./tools
COPY examples ./examples

# The base's own torch and numpy are kept: Transformer Engine is built against exactly those.
RUN { python3 -m pip list --format=freeze | grep -iE '^(torch|numpy)==' || true; } > /tmp/keep.txt \
    && PIP_BREAK_SYSTEM_PACKAGES=1 PIP_CONSTRAINT='' \
       python3 -m pip install --no-cache-dir --constraint /tmp/keep.txt -e . \
    && rm -f /tmp/keep.txt \
    && megatron-ove --help > /dev/null

CMD ["megatron-ove", "--help"]
