PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check format soak clean bench bench-quick docs

demo: .venv/.run
	$(BIN)/limbeck run kd --preset demo

test: .venv/.test check
	$(BIN)/python -m pytest -m "not soak"

check: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

soak: .venv/.test
	$(BIN)/python -m pytest -m soak

bench: .venv/.bench
	$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

bench-quick: .venv/.bench
	$(BIN)/python benchmarks/run.py --quick $(BENCH_ARGS)

docs: .venv/.run
	$(BIN)/python docs/generate.py

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache dist build

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.run: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/.test: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[all,test]'
	touch $@ .venv/.run

.venv/.bench: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@ .venv/.run
