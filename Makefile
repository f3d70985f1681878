# Every target works in its own virtual environment, .venv, built on first use and again when pyproject.toml
# or TORCH changes; the system's Python is never touched.
#
#   PYTHON       interpreter that builds .venv
#   TORCH        what to install as torch, before everything else. On a machine without a GPU an unpinned torch
#                may pull gigabytes of CUDA packages; where the pinned one does too, point PIP_INDEX_URL or
#                PIP_EXTRA_INDEX_URL at an index of CPU wheels. For a CUDA build: make test TORCH=torch
#   TRITON       what to install as triton beside it: the release the kernels' registers are counted with. Empty beside
#                another torch, which may need a release of its own
#   WORKERS      test processes, each with one torch thread (0: all in one process)
#   TESTS        what to test: make test TESTS=tests/ops/test_topk.py
#   PYTEST_ARGS  more arguments for pytest: make test PYTEST_ARGS="-k ties -x"
#   CONSTRAINTS  a file of versions to hold packages at, as constraints-oldest.txt does
#   EXTRAS       of pyproject.toml, that are installed
#   LAST         a package to put in last and without regard to what others want of it
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= $(if $(filter torch==2.13.0,$(TORCH)),triton==3.7.1)
WORKERS ?= 2
TESTS ?= tests bench l3d l3d_kernels
PYTEST_ARGS ?=
CONSTRAINTS ?=
EXTRAS ?= hf,datasets,zoo,report,log,docs,dev
LAST ?=

VENV := .venv
MARKED := $(if $(QUICK_ONLY),not slow and )not slow_kernels and not long
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := runs/demo

.DEFAULT_GOAL := help
.PHONY: help demo test test-kernels test-long test-oldest test-light test-newest bench lint format docs clean FORCE

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP)  ## decompose the toy model "tms" and write its report to runs/demo
	$(BIN)/l3d toy tms --out $(DEMO) --overwrite
	@echo "report:  $(CURDIR)/$(DEMO)/report.html"
	@echo "metrics: $(CURDIR)/$(DEMO)/metrics.json"

test: $(STAMP)  ## run the whole test suite, docstring examples included
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "$(MARKED)" --benchmark-disable --doctest-modules $(TESTS) $(PYTEST_ARGS)

test-kernels: $(STAMP)  ## run the longer form of the kernels' tests: every launch configuration, larger sizes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "slow_kernels or not slow_kernels" tests/kernels $(PYTEST_ARGS)

test-long: $(STAMP)  ## kill runs, damage files, draw random models and losses, watch memory; prints the counts
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s -m "long or not long" tests/long $(PYTEST_ARGS)

# The quick part of the suite in environments of their own. `interpreter` looks for a release of Python in pyenv's folder
# and in /usr/bin, else it is PYTHON.
interpreter = $(or $(lastword $(wildcard $(HOME)/.pyenv/versions/$(1).*/bin/python3) $(wildcard /usr/bin/python$(1))),$(PYTHON))
LIGHT_TESTS ?= tests/cli tests/data tests/storage tests/training/test_messages.py tests/report tests/test_versions.py

test-oldest:  ## run the suite's quick part with the oldest versions that pyproject.toml allows (Python 3.10 if present)
	$(MAKE) test QUICK_ONLY=1 VENV=.venv-oldest PYTHON=$(call interpreter,3.10) CONSTRAINTS=constraints-oldest.txt \
	  TORCH=torch==2.11.0 TRITON=triton==3.6.0 EXTRAS=hf,datasets,zoo,report,log,test

test-light:  ## run tests of two minutes with the oldest numpy, pytest and other small packages beside the usual torch
	$(MAKE) test QUICK_ONLY=1 VENV=.venv-light CONSTRAINTS=constraints-oldest.txt EXTRAS=hf,report,test TESTS="$(LIGHT_TESTS)"

test-newest:  ## run the suite's quick part with the newest torch and triton (Python 3.13 if present)
	$(MAKE) test QUICK_ONLY=1 VENV=.venv-newest PYTHON=$(call interpreter,3.13) TORCH=torch==2.14.1 LAST=triton==3.9.0

bench: $(STAMP)  ## time operations, extraction, steps and whole runs, ours beside two others (minutes)
	$(BIN)/python -m pytest bench --benchmark-group-by=group --benchmark-columns=median,iqr,rounds

lint: $(STAMP)  ## check style, format and types; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## rewrite the files in the project's format
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## build the documentation site into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site:    $(CURDIR)/site/index.html"

clean:  ## remove .venv, runs/, site/, caches and build products
	rm -rf $(VENV) runs site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# .venv/.torch holds what .venv was built with; it is written once torch and triton are in.
PINNED := $(strip $(TORCH) $(TRITON) $(CONSTRAINTS) $(LAST))
ifneq ($(shell cat $(VENV)/.torch 2>/dev/null),$(PINNED))
$(STAMP): FORCE
endif
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check
HELD := $(addprefix -c ,$(CONSTRAINTS))

$(STAMP): pyproject.toml $(CONSTRAINTS)
	[ "$$(cat $(VENV)/.torch 2>/dev/null)" = "$(PINNED)" ] || $(PYTHON) -m venv --clear $(VENV)
	$(INSTALL) $(HELD) "$(TORCH)" $(TRITON)
	echo "$(PINNED)" > $(VENV)/.torch
	$(INSTALL) $(HELD) -e ".[$(EXTRAS)]"
	$(if $(LAST),$(INSTALL) --no-deps $(LAST))
	touch $@
