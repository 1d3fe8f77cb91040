# Two commands: `make demo` fuses three small models offline, `make test` runs the tests. Each makes .venv if it is missing.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
DEMO := build/demo

.PHONY: demo test check install
.DEFAULT_GOAL := help

help:
	@echo "make demo   train three small source models and a pivot, fuse them, measure the result (offline, 2 cores)"
	@echo "make test   run the tests"
	@echo "make check  formatter, linter, type checker"

install: $(VENV)/.installed

# torch first, by itself: the others would draw in another build of it
$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not installed; set PYTHON=..." >&2; exit 2; }
	@command -v g++ >/dev/null || { echo "error: g++ is not installed; DeepSpeed compiles a small part at its first start" >&2; exit 2; }
	@echo "installing into $(VENV): torch, then the project and what its tests need (some minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@echo "compiling DeepSpeed's CPU part (under a minute)"
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -c "from fusion import cluster; cluster.start(); cluster.stop()" >/dev/null
	@touch $@

demo: install
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m data_prep.demo --out $(DEMO)
	@PATH="$(CURDIR)/$(BIN):$$PATH" HF_HUB_OFFLINE=1 $(BIN)/deepspeed --num_gpus 2 launch/fuse.py --config configs/demo.yaml

test: install
	@PATH="$(CURDIR)/$(BIN):$$PATH" HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: install
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy fusion data_prep launch/fuse.py
	@$(BIN)/mypy launch/merge.py launch/collect.py launch/evaluate.py
