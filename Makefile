# Everything runs in .venv, which the first target that needs it makes. Nothing else has to be set up.
#
#   make sweep      the default campaign: 768 faults in the built-in model, about a minute
#   make test       the default tests
#   make test-all   the slow ones too
#   make test-kernels  those that compare numbers, with the kernels of older processors
#   make test-slurm on a real Slurm: see tests/slurm/start.sh
#   make test-ci    first these, then all others
#   make quality    lint, format, types, and who imports whom
#   make style      format and fix what can be fixed

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST_ARGS ?=
# Files of tests are shared out over the cores; those on a real Slurm want the machine for themselves.
PYTEST := $(BIN)/python -m pytest
SHARED := -n logical --maxprocesses 8 --dist loadfile

.PHONY: sweep test test-all test-kernels test-slurm test-ci quality style reference clean

sweep: $(VENV)/.installed
	$(BIN)/python run_sweep.py

test: $(VENV)/.installed-test
	$(PYTEST) $(SHARED) $(PYTEST_ARGS)

test-all: $(VENV)/.installed-test
	$(PYTEST) -m "not slurm" $(SHARED) $(PYTEST_ARGS)

# What the libraries compute depends on the processor. What the tests say must not.
OLDER := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2

test-kernels: $(VENV)/.installed-test
	$(OLDER) $(PYTEST) -m "kernels and not slow and not slurm" $(SHARED) $(PYTEST_ARGS)

test-ci: test-slurm test-all

test-slurm: $(VENV)/.installed-test
	$(PYTEST) -m slurm tests/slurm $(PYTEST_ARGS)

quality: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

style: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Trains the two built-in models again (minutes on two cores).
reference: $(VENV)/.installed
	$(BIN)/python -m experiments.reference_models.train

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "needs Python 3.11 or later, got $$($(PYTHON) --version); set PYTHON=python3.11" >&2; exit 3; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.made setup.cfg pyproject.toml constraints.txt
	$(INSTALL) --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(INSTALL) --editable '.[test]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) --editable '.[test,dev]'
	touch $@
