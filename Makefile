# Two commands do everything on a fresh machine: `make compare` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

.PHONY: help compare test test-all lint types docs throughput engine clean

help:
	@echo "make compare      set up, run the main comparison (ARGS='--full' for the long one)"
	@echo "make test         set up, lint, type check, default tests"
	@echo "make test-all     all tests, those marked slow, peer and gpu too (without a GPU these are skipped)"
	@echo "make docs         what is generated in the documentation"
	@echo "make throughput   the speed of the core: many seeds, dynamic programming"
	@echo "make engine       the speed of the language-model engine (ARGS: peers to run beside it)"

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "kl_rl needs Python >= 3.11; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $(STAMP)

compare: $(STAMP)
	$(BIN)/kl-rl compare $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

types: $(STAMP)
	$(BIN)/mypy

test: lint types
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)
	XLA_FLAGS=--xla_force_host_platform_device_count=8 $(BIN)/python -m pytest -n 2 -m optimized $(ARGS) || test $$? -eq 5

test-all: lint types
	$(BIN)/python -m pytest -n 2 --dist worksteal -m '' $(ARGS)
	XLA_FLAGS=--xla_force_host_platform_device_count=8 $(BIN)/python -m pytest -n 2 -m optimized $(ARGS) || test $$? -eq 5

docs: $(STAMP)
	$(BIN)/python docs/generate.py

engine: $(STAMP)
	$(BIN)/python benchmarks/engine.py $(ARGS)

throughput: $(STAMP)
	$(BIN)/python benchmarks/throughput.py $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache build *.egg-info
