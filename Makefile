# Two commands matter: `make course` and `make test`. Without make, see the README.
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: help course test lab assess base gallery clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

course: .venv/installed  ## install, run all notebooks, print the result (ARGS="--from 04")
	$(PY) -m hallulib course $(ARGS)

test: .venv/installed-dev  ## install, check style, run the tests (ARGS="-m unit")
	$(PY) -m ruff check .
	$(PY) -m pytest $(ARGS)

lab: .venv/installed  ## open JupyterLab in notebooks/
	$(PY) -m jupyterlab --notebook-dir=notebooks $(ARGS)

assess: .venv/installed  ## let people grade without code (ARGS="--set assessment.assessor=dana")
	$(PY) -m hallulib assess $(ARGS)

base: .venv/installed  ## rebuild the small base model in data/ (up to two hours on 2 cores)
	$(PY) data/build/pretrain.py $(ARGS)

gallery: .venv/installed  ## copy the executed notebooks of the default run to outputs/gallery
	$(PY) -m hallulib gallery

clean:  ## remove the environment and caches; runs in outputs/ stay
	rm -rf .venv .pytest_cache .ruff_cache build hallulib.egg-info
	find hallulib tests notebooks -name __pycache__ -prune -exec rm -rf {} +

# The stamps are newer than what they depend on once everything is installed, so a rerun is quick.
.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: add PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	$(PIP) --no-deps -e .
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	touch $@
