# One command each: `make finetune` and `make test` do all the set-up themselves, once.
PYTHON ?= python3
PY := .venv/bin/python
SETUP := pyproject.toml .ci/setup_env.py
# ARGS goes to the command: make finetune ARGS="--model ./llama --data notes.txt"
ARGS ?=

.PHONY: help finetune test test-all check lint types format compile bench gpu clean
help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

.venv/ready-run: $(SETUP)
	@$(PYTHON) .ci/setup_env.py finetune && touch $@
.venv/ready-test: $(SETUP)
	@$(PYTHON) .ci/setup_env.py finetune test && touch $@ .venv/ready-run
.venv/ready-lint: .venv/ready-test
	@$(PYTHON) .ci/setup_env.py finetune test lint && touch $@

finetune: .venv/ready-run ## train a QLoRA adapter and show that it worked
	@$(PY) -m peft_fast.finetune $(ARGS)

test: .venv/ready-test ## the tests, without the slow matrices
	$(PY) -m pytest -m "not slow and not gpu" -n 2 $(ARGS)
test-all: .venv/ready-test ## every test that runs without a GPU
	$(PY) -m pytest -m "not gpu" -n 2 $(ARGS)
gpu: .venv/ready-test ## the correctness suite compiled for the GPU that is here, then the benchmarks
	$(PY) -m pytest -m "gpu" $(ARGS)
	$(PY) -m bench.run

compile: .venv/ready-test ## compile every kernel for every GPU target: registers, spills, shared memory
	$(PY) -m bench.compile $(ARGS)
bench: .venv/ready-test ## benchmarks on this machine; CSV and table under bench/results
	$(PY) -m bench.run $(ARGS)

lint: .venv/ready-lint ## ruff, formatting
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
types: .venv/ready-lint ## pyright and mypy
	$(PY) -m pyright && $(PY) -m mypy
format: .venv/ready-lint ## apply ruff's fixes and formatting
	$(PY) -m ruff check --fix . ; $(PY) -m ruff format .
check: lint types test ## what must be green before a commit leaves this machine

clean: ## remove the environment and everything generated
	rm -rf .venv build dist *.egg-info runs .pytest_cache .ruff_cache .mypy_cache
