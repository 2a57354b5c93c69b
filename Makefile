# Two commands do everything, each from nothing: `make demo` and `make test`. The environment is .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint types imports check quick notebooks docs clean

demo: .venv/ready
	$(BIN)/python recipes/qat_mobilenet.py

test: lint types imports check

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

imports: .venv/ready
	$(BIN)/lint-imports

check: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal # two workers of many threads each would fight for the cores

quick: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

notebooks: .venv/ready
	$(BIN)/python docs/execute_notebooks.py

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/docs: .venv/ready
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.14.1 torchvision==0.29.1
	$(BIN)/python -m pip install --quiet torchao==0.18.0 executorch==1.5.1
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv runs
