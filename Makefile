# Each line is a command one could type. `make test` and `make demo` create what they need.
PYTHON ?= python3
TORCH ?= 2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench readme compat clean

demo: $(VENV)/installed
	$(BIN)/python -m compressed_cache demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -q -n auto

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(VENV)/installed
	$(BIN)/python -m pytest bench --benchmark-only

# The demo and the evaluation of the README, then all its tables.
readme: $(VENV)/installed
	$(BIN)/python -m compressed_cache demo --out bench/results
	$(BIN)/python -m compressed_cache.bench.harness
	$(BIN)/python -m compressed_cache.bench.readme

# The oldest transformers that is supported.
compat:
	$(MAKE) test VENV=.venv-compat EXTRA="transformers==5.17.0"

# torch comes first and pinned, so that nothing later pulls another build.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "torch==$(TORCH)" $(EXTRA)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .venv-compat build dist demo_results *.egg-info .pytest_cache .ruff_cache
