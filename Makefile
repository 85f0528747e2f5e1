# make quickstart | test | lint: each makes .venv on demand; nothing else to set up but Python 3.11+.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
# The log of a test run names its slowest tests; two workers because JAX already uses several threads in each.
PYTEST := $(PY) -m pytest -n 2 --durations=10

.PHONY: quickstart test test-all lint format clean

quickstart: $(VENV)/.runtime
	$(PY) run.py quickstart

test: $(VENV)/.dev
	$(PYTEST) -m "not slow" tests

test-all: $(VENV)/.dev
	$(PYTEST) tests

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PY) .ci/sizes.py

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "metajax needs Python 3.11 or newer; try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: requirements.txt | $(VENV)/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.dev: requirements-dev.txt requirements.txt $(VENV)/.runtime
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
