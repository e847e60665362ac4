# megatron_ove on top of an image that already holds torch, CUDA, NCCL, Transformer Engine, flash-attn and Apex.
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

# The base's own torch, numpy and CUDA packages are kept: they are built against one another. None of ours asks for
# Transformer Engine, flash-attn or Apex; what is there is used (docs/gpu.md).
RUN kept='^(torch|numpy|triton|apex|flash[-_]attn|transformer[-_]engine[-_a-z0-9]*)==' \
    && { python3 -m pip list --format=freeze | grep -iE "$kept" || true; } > /tmp/keep.txt \
    && cat /tmp/keep.txt \
    && PIP_BREAK_SYSTEM_PACKAGES=1 PIP_CONSTRAINT='' \
       python3 -m pip install --no-cache-dir --constraint /tmp/keep.txt -e . \
    && rm -f /tmp/keep.txt \
    && megatron-ove --help > /dev/null

CMD ["megatron-ove", "--help"]
