# The one door. `make demo` and `make test` do all set-up themselves, in .venv; nothing global is touched.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

# Python 3.11 or 3.12: PYTHON=... if given, else the first that runs.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A second transformers, off sys.path: exports are tested under both (tests/integration/test_hf_transformers5.py).
TRANSFORMERS5 := $(VENV)/transformers5
TRANSFORMERS5_PACKAGES := transformers==5.23.0 huggingface_hub==2.4.0 tokenizers==0.23.3 httpx2==2.16.2 httpcore2==2.16.2 \
	typer==0.29.2 annotated-doc==0.0.7 anyio==4.16.0 truststore==0.10.5 h11==0.16.0
# Kernels are tested under Triton's interpreter, which needs all of Triton (1 GB): only for tests.
TRITON := $(VENV)/.triton-installed
SHELL_SCRIPTS = $(shell find examples tests tools -name '*.sh' -o -name '*.sbatch' -o -name '*.env.example')
# On a terminal pip shows its progress bars.
PIP = $(BIN)/python -m pip install $$([ -t 2 ] || echo --quiet) --disable-pip-version-check

# make demo FAST=1 IMAGES=dir PAGES=dir VIDEOS=dir
DEMO_ARGS := $(if $(FAST),--fast) $(if $(IMAGES),--images "$(IMAGES)") $(if $(PAGES),--pages "$(PAGES)") \
	$(if $(VIDEOS),--videos "$(VIDEOS)")

.PHONY: help setup demo test test-unit test-full lint format type test-gpu bench bench-gpu clean clean-runs

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) $(TRANSFORMERS5)/.installed ## install everything into .venv (done by the other targets too)

$(STAMP): setup.py
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed and was not found; install one or run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "Making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing torch 2.13.0 (1 of 2)"
	@$(PIP) torch==2.13.0
	@echo "Installing megatron_ove and what it needs (2 of 2)"
	@$(PIP) -e '.[dev]'
	@touch $@

$(TRANSFORMERS5)/.installed: Makefile | $(STAMP)
	@echo "Installing a second transformers for the tests"
	@$(PIP) --no-deps --upgrade --target $(TRANSFORMERS5) $(TRANSFORMERS5_PACKAGES)
	@touch $@

demo: $(STAMP) ## the whole path on real input: preprocess, train, resume, export, report
	@$(BIN)/python examples/quickstart/demo.py $(DEMO_ARGS)

$(TRITON): setup.py | $(STAMP)
	@echo "Installing Triton for the tests"
	@$(PIP) -e '.[triton]'
	@touch $@

# Two files of tests at a time, in the order of their folders, which begins with the longest and ends with the shortest.
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=15

test: $(STAMP) $(TRANSFORMERS5)/.installed $(TRITON) ## what every change has to pass, on a CPU
	$(PYTEST) -m "not gpu and not full"

test-unit: $(STAMP) $(TRITON) ## the pure functions only, in a minute
	$(PYTEST) -m "not gpu and not full" tests/unit

test-full: $(STAMP) $(TRANSFORMERS5)/.installed $(TRITON) ## also what takes long: all layouts over many steps, benchmarks, SLURM's time limit
	$(PYTEST) -m "not gpu"

# On a CUDA machine without a network, make test-gpu WHEELS=dir installs the wheels in dir beside the machine's own torch
# (SYSTEM_PYTHON=python3); with a network, in .venv. BENCH_GPU_ARGS goes to the benchmark, e.g. "--sections speed".
ifdef WHEELS
SYSTEM_PYTHON ?= python3
GPU_SITE := runs/gpu/site
GPU_SETUP := $(GPU_SITE)/.installed
GPU_PYTHON := PYTHONPATH="$(abspath $(GPU_SITE)):$(CURDIR)" $(SYSTEM_PYTHON)
else
GPU_SETUP := $(STAMP)
GPU_PYTHON := $(BIN)/python
endif

runs/gpu/site/.installed: $(if $(WHEELS),$(wildcard $(WHEELS)/*.whl*))
	PYTHON=$(SYSTEM_PYTHON) tools/gpu/install_wheels.sh "$(WHEELS)" runs/gpu/site
	@touch $@

test-gpu: $(GPU_SETUP) ## kernels on a CUDA machine, against plain ones (WHEELS=dir: without a network)
	$(GPU_PYTHON) -m pytest -m gpu tests/gpu

bench-gpu: $(GPU_SETUP) ## speed, MFU, memory and FP8 of a CUDA machine, to runs/gpu/bench.json and .md
	$(GPU_PYTHON) tools/gpu/bench_gpu.py $(BENCH_GPU_ARGS)

bench: $(STAMP) ## heads against the published method and the full softmax, a few minutes of one core
	$(BIN)/python tools/benchmark/heads.py --num-classes 50000 --json runs/benchmark/heads.json

lint: $(STAMP) ## formatting, lint, layers, types, spelling, shell scripts, Dockerfile
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright
	$(BIN)/codespell
	$(BIN)/shellcheck .ci/run $(SHELL_SCRIPTS)
	$(BIN)/hadolint Dockerfile

format: $(STAMP) ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

type: $(STAMP) ## static types
	$(BIN)/basedpyright

# Trained runs are nobody's rubbish: only what these targets make themselves goes. The quick start marks its folder.
clean: ## remove caches, build output and the folders of demo, bench and test-gpu; keep .venv and your runs
	rm -rf .pytest_cache .ruff_cache .hypothesis .import_linter_cache build runs/gpu/site runs/benchmark
	@if [ -e runs/quickstart/made_by_the_quick_start ]; then echo "rm -rf runs/quickstart"; rm -rf runs/quickstart; fi

clean-runs: ## list the folders of runs/ with their sizes; CONFIRM=1 removes them, trained models and all
	@if [ -z "$$(ls -A runs 2>/dev/null)" ]; then echo "runs/ holds nothing"; exit 0; fi; \
	du -sh runs/*; \
	if [ "$(CONFIRM)" = 1 ]; then rm -rf runs; echo "removed"; \
	else echo "Nothing was removed. make clean-runs CONFIRM=1 removes all of it, checkpoints included."; fi
