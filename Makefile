# Each line is a command one could type. `make test` and `make demo` create what they need.
PYTHON ?= python3
TORCH ?= 2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check bench report compat clean

demo: $(VENV)/installed
	$(BIN)/python -m compressed_cache demo

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q

bench: $(VENV)/installed
	$(BIN)/python -m pytest bench --benchmark-only

# A CPU build of torch where the package index has one; a CUDA build is kept if it is there already.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=25"
	$(BIN)/pip install --quiet "torch==$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist demo_results *.egg-info .pytest_cache .ruff_cache
