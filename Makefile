PYTHON ?= python3
BIN := .venv/bin
ROUNDS ?= 100
WORKERS ?= 2

.PHONY: help install quickstart test test-long test-gpu torture lint clean

help:
	@echo "make quickstart   install, generate a sample data set, train a binary network on 2 ranks"
	@echo "make test         install, then lint, type check and all tests that take seconds"
	@echo "make test-long    the tests that take minutes as well"
	@echo "make test-gpu     the tests that need a GPU"
	@echo "make torture      kill and signal a run at random moments, ROUNDS=100 times: it must end as if left in peace"
	@echo "make install      only make .venv and install the project into it"

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

install: .venv/installed

quickstart: install
	$(BIN)/cyclebnn data sample sample_data
	$(BIN)/python -m launch recipes/quickstart.yaml --local --tasks-per-node 2

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not long and not gpu"

test-long: lint
	$(BIN)/python -m pytest -m "not gpu"

test-gpu: install
	$(BIN)/python -m pytest -m gpu

torture: install
	$(BIN)/python tests/torture.py --rounds $(ROUNDS)

clean:
	rm -rf .venv build *.egg-info
