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
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= $(if $(filter torch==2.13.0,$(TORCH)),triton==3.7.1)
WORKERS ?= 2
TESTS ?= tests bench l3d l3d_kernels
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := runs/demo

.DEFAULT_GOAL := help
.PHONY: help demo test test-kernels test-long bench lint format docs clean FORCE

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP)  ## decompose the toy model "tms" and write its report to runs/demo
	$(BIN)/l3d toy tms --out $(DEMO) --overwrite
	@echo "report:  $(CURDIR)/$(DEMO)/report.html"
	@echo "metrics: $(CURDIR)/$(DEMO)/metrics.json"

test: $(STAMP)  ## run the whole test suite, docstring examples included
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow_kernels and not long" --benchmark-disable --doctest-modules $(TESTS) $(PYTEST_ARGS)

test-kernels: $(STAMP)  ## run the longer form of the kernels' tests: every launch configuration, larger sizes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "slow_kernels or not slow_kernels" tests/kernels $(PYTEST_ARGS)

test-long: $(STAMP)  ## kill runs and damage files, again and again; prints what was counted
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s -m "long or not long" tests/long $(PYTEST_ARGS)

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

# .venv/.torch holds the TORCH and TRITON that .venv was built with; it is written once they are in.
PINNED := $(strip $(TORCH) $(TRITON))
ifneq ($(shell cat $(VENV)/.torch 2>/dev/null),$(PINNED))
$(STAMP): FORCE
endif

$(STAMP): pyproject.toml
	[ "$$(cat $(VENV)/.torch 2>/dev/null)" = "$(PINNED)" ] || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" $(TRITON)
	echo "$(PINNED)" > $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[hf,datasets,zoo,report,log,docs,dev]"
	touch $@
