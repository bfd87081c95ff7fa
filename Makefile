# Start with `make smoke` and `make test`; `make` alone lists all targets.

SHELL := /bin/sh
FITS := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 11))

# Each Python is run, not only looked up: a version manager's shim can exist and still not run.
PYTHON := $(shell for p in python3.11 python3.10 python3; do \
	"$$p" -c '$(FITS)' 2>/dev/null && { echo "$$p"; break; }; done)
ifeq ($(PYTHON),)
PYTHON := python3
endif

.PHONY: help install smoke test test-slow test-slurm chaos bench gpu-check lint browser
.DELETE_ON_ERROR:

help:
	@echo 'make smoke      install, make demo data, embed it, train on it with two ranks (on the CPU)'
	@echo 'make test       install, run the tests'
	@echo 'make test-slow  install, run the tests that take minutes'
	@echo 'make chaos      install, train through 50 kills and other faults (half an hour to an hour)'
	@echo 'make test-slurm install, train on a real Slurm of three nodes on this machine (root and apt)'
	@echo 'make bench      install, compare the net'"'"'s memory and speed with diffusers'"'"' and the original (half an hour)'
	@echo 'make gpu-check  install, check and time on a GPU what only a GPU can show (ten minutes)'
	@echo 'make lint       install, check style (ruff) and types (mypy)'
	@echo 'make browser    install Debian'"'"'s chromium (as root), with which make test checks the report'
	@echo 'make install    make .venv with every package pinned by constraints.txt'
	@echo
	@echo 'PYTHON=/path/to/python3.11 picks the Python (found: $(PYTHON)).'

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c '' 2>/dev/null || { echo "cannot set up: '$(PYTHON)' does not run; install Python 3.11 and name it, make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) launch/check_machine.py
	@.venv/bin/python -c 'import pip; $(FITS)' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[test,lint,evaluate,cloud,tensorboard]'
	.venv/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt --no-deps clean-fid
	@touch $@

smoke: install
	sh launch/smoke.sh

test: install
	.venv/bin/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder -m 'not slow' tests

test-slow: install
	.venv/bin/python -m pytest -q -m slow tests

chaos: install
	.venv/bin/python -m tests.chaos

test-slurm: install
	.venv/bin/python -m pytest -q -rs -m slow tests/test_slurm.py

# The original net as its authors published it, for `make bench` to compare with; nothing else needs it.
.bench/installed: | install
	.venv/bin/python -m pip install --disable-pip-version-check -q --no-deps --target .bench deepfloyd-if==1.0.1
	@touch $@

bench: .bench/installed
	PYTHONPATH=.bench .venv/bin/python -m tests.benchmarks.unet_memory
	PYTHONPATH=.bench .venv/bin/python -m tests.benchmarks.unet_speed
	.venv/bin/python -m tests.benchmarks.fewbit_training

# Another Python, PYTHON_GPU=python3 say, needs torch and a few packages: docs/guide/gpu_check.md.
PYTHON_GPU := .venv/bin/python
gpu-check: $(if $(filter .venv/%,$(PYTHON_GPU)),install)
	$(PYTHON_GPU) -m tests.gpu_check

lint: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# The tests of the report's page need it, and are skipped without it.
browser:
	command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }
