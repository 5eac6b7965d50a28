# make help lists what there is.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The load generator of the service's tests pins other versions than wanlab does, so it has an environment of its own.
AIPERF := $(VENV)/aiperf/bin/aiperf
# Two test processes share the cores: one thread each, or they wait for one another.
TEST_THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
# The order of tests is that of tests/conftest.py: what takes long starts first.
TESTS = $(TEST_THREADS) $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder
# JupyterLab for this machine only: loopback, a new token at each start, and nothing asked of the internet.
LAB_CONFIG := $(abspath $(dir $(lastword $(MAKEFILE_LIST))))/.jupyter
LAB_FLAGS := --ip 127.0.0.1 --ServerApp.root_dir . --LabApp.extension_manager readonly --LabApp.news_url None \
	--LabApp.check_for_updates_class jupyterlab.NeverCheckForUpdate

.DEFAULT_GOAL := help
.PHONY: help install demo check test fuzz kills chromium lab lint nano-eval doctor clean

help: ## show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv and install wanlab into it (again only when pyproject.toml changes)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "wanlab needs Python 3.11 or newer: make PYTHON=python3.11 install" >&2; exit 1; }
	@echo "installing into $(VENV): a few minutes and about 8 GB, most of it torch with CUDA" >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@# the stubs alone: what they depend on is all of TensorRT
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps 'tensorrt-stubs>=10.13,<11'
	@echo "installed" >&2
	@touch $@

$(AIPERF): $(STAMP)
	@$(BIN)/python -m venv $(VENV)/aiperf
	@$(VENV)/aiperf/bin/python -m pip install --quiet --disable-pip-version-check 'aiperf>=0.13,<0.14' || \
		echo "no AIPerf, so its test of the service is skipped" >&2

demo: $(STAMP) ## one photograph to one report; the last line is the path of the report
	@$(BIN)/wanlab run notebooks/00_quickstart.ipynb --force

check: $(STAMP) ## style, types and the quick tests: two minutes on two cores
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(TESTS) -m "not notebook and not browser and not slow and not gpu"

test: $(STAMP) $(AIPERF) chromium ## run every test, and with them every notebook; prints the ten slowest
	@$(TESTS) --durations=10

kills: $(STAMP) ## kill runs, sweeps, publications and exports at 30 random moments; nothing may be lost or left
	@WANLAB_KILLS=6 $(TESTS) tests/launch/test_kills.py

fuzz: $(STAMP) ## 10,000 mutated inputs for every parser (FUZZ="--parser grid" for one); its figures go into docs/input.md
	@PYTHONPATH=tests $(TEST_THREADS) $(BIN)/python -m support.fuzz --json data/results/fuzzing_cpu.json $(FUZZ)
	@$(BIN)/python benchmarks/tables.py

chromium: ## the browser of the tests: Debian's, where none is there yet
	@command -v "$${CHROMIUM:-chromium}" >/dev/null || command -v chromium-browser >/dev/null || { \
		echo "installing chromium, which tests of pages need" >&2; \
		if [ "$$(id -u)" = 0 ]; then as=; else as="sudo -n"; fi; \
		{ $$as apt-get update -qq && $$as env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium; } >/dev/null 2>&1 || \
			echo "no chromium, so tests of pages will fail: install it, or set CHROMIUM to the path of one" >&2; }

lab: $(STAMP) ## open JupyterLab on this machine only, with a token; LAB=--no-browser and the like are added
	@JUPYTER_CONFIG_PATH=$(LAB_CONFIG) $(BIN)/jupyter lab $(LAB_FLAGS) $(LAB) notebooks/index.ipynb

lint: $(STAMP) ## check style of code and notebooks
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/nbstripout --verify notebooks/*.ipynb tests/fixtures/notebooks/*.ipynb

nano-eval: $(STAMP) ## measure wan-nano on its held-out cases (CPU)
	@$(BIN)/wanlab nano-eval

doctor: $(STAMP) ## what this machine can do
	@$(BIN)/wanlab doctor

clean: ## remove .venv and caches; outputs/ stays
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
