# `make demo` and `make test` do all set-up on a fresh clone: a virtual environment in .venv, the install, then their job.
PYTHON ?= python3
BIN := .venv/bin
SEED ?= 0

.PHONY: demo test test-slow lint format clean

demo: .venv/ready
	$(BIN)/python examples/demo.py --seed $(SEED)

test: .venv/ready
	$(BIN)/python -m pytest

# minutes: merges killed at random moments, full disks
test-slow: .venv/ready
	$(BIN)/python -m pytest tests/slow

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# removes what a later `make` builds again, not your runs in saved/
clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis

.venv/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@
