# Each line is a command one could type. `make test` and `make demo` create what they need.
PYTHON ?= python3
TORCH ?= 2.13.0
TRANSFORMERS ?= ==5.24.0
TRITON ?= 3.7.1
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test quick lint docs dist bench pages compat core clean

demo: $(VENV)/installed
	$(BIN)/python -m compressed_cache demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -q -n auto

# What a change is tested with while it is made; `make test` is for what is to be merged.
quick: $(VENV)/installed
	$(BIN)/python -m pytest -q -n auto -m "not slow"

lint: $(VENV)/installed docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# A wheel and a source distribution, which carries the tests.
dist: $(VENV)/installed
	rm -rf dist
	$(BIN)/python -m build --outdir dist

bench: $(VENV)/installed
	$(BIN)/python -m pytest bench --benchmark-only

# The demo, all policies and the evaluation, then all pictures and tables of README.md and docs/.
pages: $(VENV)/installed
	$(BIN)/python -m compressed_cache demo --out bench/results
	$(BIN)/python -m bench.catalogue
	$(BIN)/python -m bench.harness
	$(BIN)/python -m tests.features
	$(BIN)/python -m bench.screenshot
	$(BIN)/python -m bench.pages

# The core under the oldest transformers that is supported and under the newest there is. What it
# needs of a release comes first, so that a failure names what has moved.
CORE := backends cache compile errors families loop modes padding properties reference turns
compat:
	$(MAKE) core VENV=.venv-oldest TRANSFORMERS===5.17.0
	rm -rf .venv-newest
	$(MAKE) core VENV=.venv-newest TRANSFORMERS=

core: $(VENV)/installed
	$(BIN)/python -c "import transformers; print('transformers', transformers.__version__)"
	$(BIN)/python -m pytest -q tests/test_canary.py
	$(BIN)/python -m pytest -q -n auto $(CORE:%=tests/test_%.py)

# torch comes first and pinned, so that nothing later pulls another build; transformers is pinned
# too, so that a release of theirs is met by `make compat` and not by everybody's tests. Triton is
# that of this torch, which brings it along only where it finds CUDA. pip would compile files to
# bytecode one by one; some packages carry files that cannot be compiled.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile "torch==$(TORCH)" "triton==$(TRITON)" "transformers$(TRANSFORMERS)"
	$(BIN)/pip install --quiet --no-compile --editable ".[dev]"
	$(BIN)/python -m compileall -qq -j 0 $(VENV) || true
	touch $@

# Apart, because tests need none of it.
$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/pip install --quiet --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-kvpress build dist site demo_results *.egg-info .pytest_cache .ruff_cache
