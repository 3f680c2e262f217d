# koret: `make train` and `make test` set everything up by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help setup train test slow lint bench sample clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv and install koret with its test extras

$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard src/koret/*/csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "koret needs Python 3.10 or newer; run: make $(MAKECMDGOALS) PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing koret and its dependencies (a few minutes the first time)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

train: $(STAMP) ## fine-tune the offline base on the embedded sample and print the table base / tuned / BM25
	$(BIN)/koret train --config recipes/sample.yaml

test: $(STAMP) ## run the default test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

slow: $(STAMP) ## run the tests that take minutes, the browser's among them
	$(BIN)/python -m pytest -m "slow or browser" --timeout 3600

lint: $(STAMP) ## check style and imports
	$(BIN)/ruff check src tests benchmarks tools
	$(BIN)/ruff format --check src tests benchmarks tools

bench: $(STAMP) ## list the benchmarks, one script per question
	@ls benchmarks/*.py | sed 's|^|  $(BIN)/python |'

sample: $(STAMP) ## rebuild the embedded sample from tools/sample/articles
	$(BIN)/python tools/sample/build.py

clean: ## remove the environment and caches (runs in logs/ stay)
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist src/koret/data/_scan.* src/koret/retrieval/_kernels.*
