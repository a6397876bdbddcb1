# Two commands do all the set-up: `make demo` runs the main job, `make test` passes the tests.
# Each makes its own part of the environment, and is quick the second time.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint types sweep benchmark clean

demo: $(VENV)/.demo
	$(BIN)/innersight demo

test: lint types
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

sweep: $(VENV)/.test
	$(BIN)/python benchmarks/sweep.py --out docs/sweep.md

benchmark: $(VENV)/.benchmark
	$(BIN)/python benchmarks/run.py --out docs/benchmarks.md

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
