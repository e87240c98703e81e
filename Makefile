# gensample: `make demo` draws pictures, `make test` runs the tests. Everything is installed into $(VENV),
# once: a stamp there is newer than what the environment was made from.

PYTHON ?= python3
VENV ?= .venv
OUT ?= out

# Keep this folder off sys.path: its kernels/ would be taken for the package of that name.
export PYTHONSAFEPATH = 1
# Idle OpenMP threads sleep instead of spinning: with another process on the cores, spinning made sampling 5 times slower.
export OMP_WAIT_POLICY ?= passive

PIP_INSTALL = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
RUN_ENV = $(VENV)/.gensample-run
DEMO_ENV = $(VENV)/.gensample-demo
DEV_ENV = $(VENV)/.gensample-dev
UI_ENV = $(VENV)/.gensample-ui
FIGURES_ENV = $(VENV)/.gensample-figures
PORT ?= 7860

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo serve test test-ui lint format bench figures screenshots clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(RUN_ENV): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e .
	@touch $@

$(DEV_ENV): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@ $(RUN_ENV)

$(DEMO_ENV): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e '.[demo]'
	@touch $@ $(RUN_ENV)

$(UI_ENV): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e '.[ui-test,test]'
	@touch $@ $(RUN_ENV) $(DEMO_ENV)

$(FIGURES_ENV): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e '.[figures]'
	@touch $@ $(RUN_ENV)

demo: $(RUN_ENV) ## draw clothes with the shipped model into out/ and print their score
	$(VENV)/bin/gensample quickstart --out $(OUT)

serve: $(DEMO_ENV) ## the shipped model in a web page on this machine (PORT, default 7860)
	$(VENV)/bin/gensample demo --port $(PORT)

test: $(DEV_ENV) ## run the tests, a file at a time on each of two processes (pytest's options in ARGS)
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

test-ui: $(UI_ENV) ## the web page in headless Chromium (apt-get install --no-install-recommends chromium)
	$(VENV)/bin/python -m pytest -m ui tests/ui $(ARGS)

lint: $(DEV_ENV) ## ruff, its formatter and mypy, without changing anything
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy -p gensample

format: $(DEV_ENV) ## apply ruff's fixes and its formatter
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(DEV_ENV) ## sampling's overhead; and, with PEERS=venv/bin/python, FID tools side by side
	$(VENV)/bin/python benchmarks/overhead.py
ifdef PEERS
	$(VENV)/bin/python benchmarks/fid.py --peers $(PEERS)
endif

figures: $(FIGURES_ENV) ## the figures of README, docs and model cards, from recorded results and the shipped weights
	OMP_NUM_THREADS=1 $(VENV)/bin/python recipes/figures.py $(ARGS)

screenshots: $(UI_ENV) ## the web page's pictures in docs (needs Chromium, as test-ui)
	OMP_NUM_THREADS=1 $(VENV)/bin/python docs/screenshots.py

clean: ## remove build products and caches; environments and results stay
	rm -rf build dist gensample.egg-info .pytest_cache .mypy_cache .ruff_cache
