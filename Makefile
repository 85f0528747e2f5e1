# make quickstart | test | lint | bench | docs: each makes .venv on demand; nothing else to set up but Python 3.11+.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
# The log of a test run names its slowest tests; two workers because JAX already uses several threads in each.
PYTEST := $(PY) -m pytest -n 2 --durations=10

.PHONY: quickstart test test-all test-faults test-next plan-all bench bench-gpu docs lint format clean

quickstart: $(VENV)/.runtime
	$(PY) run.py quickstart

test: $(VENV)/.dev
	$(PYTEST) -m "not slow" tests

test-all: $(VENV)/.dev
	$(PYTEST) tests

# Faults injected into tiny runs, counted: 50 random kills and what else a pod does to a run.
test-faults: $(VENV)/.dev
	$(PY) -m tests.faults --kills 50

# The same suite on the newest releases of everything, where a Python newer than the pins allow is found.
NEXT_PYTHON ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.13*/bin/python $(HOME)/.pyenv/versions/3.12*/bin/python) \
  $(shell command -v python3.13 || command -v python3.12))
test-next:
	@test -n "$(NEXT_PYTHON)" || { echo "test-next skips: no Python 3.12 or 3.13 found; name one with NEXT_PYTHON=..."; exit 0; }
	test -z "$(NEXT_PYTHON)" || $(NEXT_PYTHON) -m venv .venv-next
	test -z "$(NEXT_PYTHON)" || sed -E 's/==.*//; /^-r|libtpu|beam/d' requirements.txt requirements-dev.txt | .venv-next/bin/python -m pip install -q -r /dev/stdin
	test -z "$(NEXT_PYTHON)" || .venv-next/bin/python -m pytest -n 2 -m "not slow" -W error::DeprecationWarning:metajax tests

# Every program of the papers' size compiled for TPU slices that are not there, minutes each: what fits, and how fast a step can be at best.
plan-all: $(VENV)/.dev
	$(PY) run.py plan --all --scale paper

# The kernels' costs beside their rivals', into docs/kernels.md: the clock of a chip, or the compiled schedule without one.
bench: $(VENV)/.dev
	$(PY) -m kernels_pallas.bench

# metajax beside PyTorch on the NVIDIA GPU that is here, into docs/gpu.md; PyTorch itself is for you to install.
bench-gpu: $(VENV)/.dev
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-gpu.txt
	$(PY) -m benchmarks.gpu

# The documentation as a site that opens offline: site/index.html.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/basedpyright --pythonpath $(PY)
	$(PY) .ci/sizes.py

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "metajax needs Python 3.11 or newer; try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "cannot make $(VENV): install Python's venv (Debian: apt-get install python3-venv)"; exit 2; }

$(VENV)/.runtime: requirements.txt | $(VENV)/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.dev: requirements-dev.txt requirements.txt $(VENV)/.runtime
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
