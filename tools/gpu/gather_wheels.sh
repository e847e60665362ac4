#!/usr/bin/env bash
# Gathers, where there is a network, what a CUDA machine without one lacks; files over 55 MiB are split.
#   tools/gpu/gather_wheels.sh OUT [WHEEL...]     WHEEL: files to add, such as a self-built Transformer Engine extension
# Target: Linux x86-64, CUDA 13 with its torch already there; PYTHON_VERSION (default 3.12) is that machine's.
# Transformer Engine's PyTorch extension is not on the index as a binary. Build it where the CUDA compiler is:
#   pip wheel --no-deps --no-build-isolation transformer-engine-torch==2.11.0
set -euo pipefail

out=${1:?usage: gather_wheels.sh OUT [WHEEL...]}
shift
mkdir -p "$out"
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014; do
  platforms+=(--platform "${tag}_x86_64")
done
download=(python3 -m pip download --quiet --only-binary=:all: --implementation cp
  --python-version "${PYTHON_VERSION:-3.12}" "${platforms[@]}" --dest "$out")
# Without what they depend on: torch is there already.
"${download[@]}" --no-deps megatron-core==0.16.1 transformer-engine==2.11.0 transformer-engine-cu13==2.11.0
# What the encoder, its tests and the benchmark import, besides torch and numpy.
"${download[@]}" pydantic==2.14.3 pyyaml==6.0.3 psutil==7.2.2 rich==15.0.0 pillow==13.0.0 pytest==9.2.0 pytest-timeout==2.4.0
(($# == 0)) || cp "$@" "$out"
find "$out" -name '*.whl' -size +55M -print0 | while IFS= read -r -d '' wheel; do
  split --bytes=55M --numeric-suffixes --suffix-length=2 "$wheel" "$wheel.part-"
  rm "$wheel"
done
ls -l "$out"
