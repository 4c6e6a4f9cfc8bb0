# One command for each thing people do. `make` alone lists them.

VENV := .venv
BIN := $(VENV)/bin
export PROMPT ?= It was a fine morning, and
# Handed to pytest: `make test PYTEST_ARGS="-k rotary -n 0"`.
PYTEST_ARGS ?=
# Two processes of one thread each: on 2 cores nearly twice as fast as one process of two threads.
PYTEST_PARALLEL := -n 2 --dist worksteal

# A Python of 3.10 or newer: PYTHON if it is set (setup says so if it is too old), else the first of these that runs.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 10))
ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell for p in $(BIN)/python python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$p && exit; done; echo python3)
endif

# The first import of a package compiles it; setup leaves that to whoever imports, so it must be allowed to.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format benchmark-docs gpu-test gpu-record clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make .venv with everything needed; does nothing when it is up to date
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not here: install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) scripts/setup_env.py --venv $(VENV)

demo: setup ## generate text with the small model inside the package (PROMPT="...")
	@echo "the demo model goes on after: $$PROMPT"; echo
	@$(BIN)/clusterfusion generate demo --prompt "$$PROMPT" -n 260 --temperature 0.6 --seed 1

test: setup lint ## lint, check types, run the tests (those marked gpu are skipped without one)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_PARALLEL) $(PYTEST_ARGS)

lint: setup ## ruff check, ruff format --check, mypy
	@status=0; \
	echo "ruff check";          $(BIN)/ruff check --quiet || status=1; \
	echo "ruff format --check"; $(BIN)/ruff format --check --quiet || { echo "make format mends this"; status=1; }; \
	echo "mypy";                $(BIN)/mypy --no-error-summary || status=1; \
	exit $$status

format: setup ## let ruff mend and format the Python files
	@$(BIN)/ruff check --fix --quiet || true
	@$(BIN)/ruff format

benchmark-docs: setup ## draw docs/benchmarks.md and the README's plot and table from benchmarks/results
	@$(BIN)/python scripts/benchmark_docs.py

# On a GPU machine: the .venv if there is one, else a Python that already has torch and pytest, else a fresh .venv.
HAS_TORCH := import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("torch", "pytest"))))
GPU_PYTHON = $$(if [ -x $(BIN)/python ]; then echo $(BIN)/python; else command -v $(PYTHON); fi)
.PHONY: gpu-python
gpu-python:
	@[ -x $(BIN)/python ] || $(PYTHON) -c '$(HAS_TORCH)' 2>/dev/null || $(MAKE) --no-print-directory setup

gpu-test: gpu-python ## the tests that need a GPU (compute capability 9.0 or newer)
	@$(GPU_PYTHON) -m pytest -m gpu $(PYTEST_ARGS)

gpu-record: gpu-python ## run them and write tests/gpu/record.json, the evidence that they passed
	@$(GPU_PYTHON) scripts/gpu_record.py

clean: ## remove .venv, caches and build products
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
