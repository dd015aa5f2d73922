# `make` lists the targets. Every target first updates .venv if its lock file has changed.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
# The installed lock, or the CPU's. For GPUs: `make setup LOCK=requirements/cuda.lock`.
LOCK ?= $(or $(patsubst .venv/.installed-%,requirements/%,$(firstword $(wildcard .venv/.installed-*))),requirements/cpu.lock)
PYTEST_ARGS ?=
# Test files run side by side, quick ones first, with one thread each: starting Ray or a model keeps one core busy.
PYTEST_WORKERS ?= 2

BIN := .venv/bin
INSTALLED := .venv/.installed-$(notdir $(LOCK))
SITE_PACKAGES := 'import sysconfig; print(sysconfig.get_path("purelib"))'
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder
INTEGRATION_TESTS := $(wildcard tests/integration tests/gpu)

export PYTHONUNBUFFERED := 1
# Keep bytecode even if the machine disables it: it halves the import time of vLLM in each of the
# many processes that a run or the tests start.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup bench-setup bench lint format test test-cluster test-nightly test-quick test-kernels soak prometheus quickstart quickstart-ablation lock clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 22

$(INSTALLED): $(LOCK) pyproject.toml scripts/environment.py
	@rm -f .venv/.installed-*
	@$(PYTHON) scripts/environment.py install --lock $(LOCK)
	@touch $@

setup: $(INSTALLED) ## make .venv from the lock file

bench-setup: $(INSTALLED) ## make .venv-bench: .venv plus the libraries that bench/ compares with
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-bench
	echo "import site; site.addsitedir('$$($(BIN)/python -c $(SITE_PACKAGES))')" \
	  > "$$(.venv-bench/bin/python -c $(SITE_PACKAGES))/venv.pth"
	$(BIN)/uv pip install --python .venv-bench --no-deps -r requirements/bench.lock

bench: bench-setup ## measure speed and cost of every method, and of TRL beside ours (takes hours)
	$(BIN)/python bench/throughput.py
	$(BIN)/python bench/peers.py

lint: $(INSTALLED) ## run ruff and the type checker on all files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(INSTALLED) ## format and fix with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: $(INSTALLED) ## run all tests but whole runs, the quick ones first
	$(PYTEST) $(wildcard tests/test_*.py) $(INTEGRATION_TESTS) -m "not slow" $(PYTEST_ARGS)

test-cluster: $(INSTALLED) ## run whole runs whose processes and nodes are killed, and jobs
	$(PYTEST) $(INTEGRATION_TESTS) -m "slow and not nightly" $(PYTEST_ARGS)

test-nightly: $(INSTALLED) ## run the whole runs for which CI has no time
	$(PYTEST) $(INTEGRATION_TESTS) -m nightly $(PYTEST_ARGS)

soak: $(INSTALLED) ## run tiny models for an hour in which a process dies or freezes every minute
	$(BIN)/python -m tests.integration.soak

prometheus: $(BIN)/prometheus ## put Debian's Prometheus into .venv: without it, test-cluster leaves its tests out

# The program alone: the package has dependencies and a service, and needs root.
$(BIN)/prometheus: | $(INSTALLED)
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && cd "$$folder" \
	  && { apt-get -qq download prometheus || { apt-get -qq update && apt-get -qq download prometheus; }; } \
	  && dpkg-deb --fsys-tarfile prometheus_*.deb | tar -xO ./usr/bin/prometheus > "$(CURDIR)/$@" \
	  && chmod +x "$(CURDIR)/$@"

test-quick: $(INSTALLED) ## run the tests that start no Ray, vLLM or DeepSpeed
	$(BIN)/pytest tests $(INTEGRATION_TESTS:%=--ignore %) $(PYTEST_ARGS)

test-kernels: bench-setup ## run the kernels generated for a GPU in an interpreter on a CPU
	TRITON_INTERPRET=1 .venv-bench/bin/python -m pytest tests/gpu/test_generated_kernels.py $(PYTEST_ARGS)

quickstart: $(INSTALLED) ## distil SmolLM2-135M into 22 of its thirty layers
	$(BIN)/python scripts/prepare_quickstart.py
	$(BIN)/distillm-ray train configs/quickstart.yaml

quickstart-ablation: $(INSTALLED) ## train the same student by plain SFT
	$(BIN)/python scripts/prepare_quickstart.py
	$(BIN)/distillm-ray train configs/methods/sft.yaml

lock: ## resolve requirements/*.lock again; UPGRADE=1 takes the newest versions allowed
	@$(PYTHON) scripts/environment.py lock $(if $(UPGRADE),--upgrade)

clean: ## remove .venv and caches, but no runs and models
	rm -rf .venv .venv-bench .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
