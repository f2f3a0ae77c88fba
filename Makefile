# Every target shares one virtual environment, made when it is missing and completed when setup.py changes.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-slow test-oracles bench lint

$(VENV)/.dev: setup.py
	test -x $(BIN)/python || $(shell command -v $(PYTHON) || echo python3) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/.tpu: $(VENV)/.dev  # the TPU compiler, which runs on any Linux machine
	$(BIN)/python -m pip install --quiet --editable '.[dev,tpu]' || echo 'no TPU compiler for this machine: its tests are skipped'
	touch $@

$(VENV)/.oracles: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet 'torch==2.13.0' 'transformers>=5,<6' peft openai uvicorn einops einx tensordict assoc-scan
	$(BIN)/python -m pip install --quiet --no-deps 'ringattention==0.1.2' 'titans-pytorch==0.5.1'
	touch $@

quickstart: $(VENV)/.dev  ## train, evaluate and ablate RoPE extension on real text
	$(BIN)/python -m experiments.ablate --config=config:ablations.rope_extension.quickstart

test: $(VENV)/.tpu  ## the suite: CPU, eight forced devices where needed, no torch
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/.tpu  ## the long forms: 50 kill rounds, toy reproductions
	$(BIN)/python -m pytest --slow -m slow

test-oracles: $(VENV)/.oracles  ## compares with the peers themselves
	$(BIN)/python -m pytest --oracles -m oracle

bench: $(VENV)/.oracles  ## prints the ratios against the peers
	$(BIN)/python -m experiments.bench

lint: $(VENV)/.dev
	$(BIN)/ruff check .
