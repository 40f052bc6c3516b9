# One command each: `make finetune` and `make test` do all the set-up themselves, once.
#   ARGS    goes to the command:       make finetune ARGS="--model ./llama --data notes.txt"
#   PYTHON  makes the environment:     make test PYTHON=python3.12
#   PY      uses another one as it is: make gpu PY=python3     (no set-up then)
ARGS ?=
PYTHON ?= python3
PY ?= .venv/bin/python
# Idle threads sleep instead of spinning: on a busy 2-core machine a training step took 1.1 s and not 5.4 s.
export OMP_WAIT_POLICY ?= passive
ready = $(if $(filter .venv/bin/python,$(PY)),.venv/ready-$(1))
# Two workers, one thread each: the tests' matrices are too small to share.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

.PHONY: help finetune test test-all check lint types format compile bench compare bench-pytest gpu gpu-all memory profile clean
help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

.venv/ready-run: pyproject.toml .ci/setup_env.py
	@$(PYTHON) .ci/setup_env.py finetune && touch $@
.venv/ready-test: pyproject.toml .ci/setup_env.py
	@$(PYTHON) .ci/setup_env.py finetune test && touch .venv/ready-run $@
.venv/ready-lint: pyproject.toml .ci/setup_env.py
	@$(PYTHON) .ci/setup_env.py finetune test lint && touch .venv/ready-run .venv/ready-test $@

finetune: $(call ready,run) ## train a QLoRA adapter and show that it worked
	@$(PY) -m peft_fast.finetune $(ARGS)

# Triton's interpreter is a property of the process: kernels are tested in a run of their own.
test: $(call ready,test) ## the tests, without the slow matrices
	TRITON_INTERPRET=1 $(PYTEST) -m "kernel and not slow" $(ARGS)
	$(PYTEST) -m "not slow" $(ARGS)
test-all: $(call ready,test) ## every test that runs without a GPU
	TRITON_INTERPRET=1 $(PYTEST) -m kernel $(ARGS)
	$(PYTEST) $(ARGS)
gpu: $(call ready,test) ## on a GPU, in 8 minutes: tests compiled, benchmarks, comparison; ARGS=--rehearse: on a CPU
	@$(PY) -m bench.gpu $(ARGS)
gpu-all: $(call ready,test) ## the same without limits: the whole correctness suite, every case
	@$(PY) -m bench.gpu --all $(ARGS)

compile: $(call ready,test) ## compile every kernel for every GPU: registers, spills, shared memory
	@$(PY) -m bench.compile $(ARGS)
bench: $(call ready,test) ## benchmarks on this machine: a table, and rows and a picture under bench/results
	@$(PY) -m bench.run $(ARGS)
compare: $(call ready,test) ## a training step beside peft's and Unsloth's: speed, memory, losses
	@$(PY) -m bench.compare $(ARGS)
memory: $(call ready,test) ## the memory of a training step, calculated: ARGS="--model llama-3-8b --seq-len 2048"
	@$(PY) -m bench.memory $(ARGS)
profile: $(call ready,test) ## where the time of a training step goes, peft's and ours
	@$(PY) -m bench.profile $(ARGS)
bench-pytest: $(call ready,test) ## the same cases under pytest-benchmark, which keeps and compares runs
	$(PY) -m pytest bench/test_bench.py --benchmark-columns=min,median,stddev,rounds $(ARGS)

lint: $(call ready,lint) ## ruff
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
types: $(call ready,lint) ## pyright and mypy
	$(PY) -m pyright && $(PY) -m mypy
format: $(call ready,lint) ## apply ruff's fixes and formatting
	$(PY) -m ruff check --fix . ; $(PY) -m ruff format .
check: lint types test ## what must be green before a commit leaves this machine

clean: ## remove the environment and all caches; runs/ with your adapters stays
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
