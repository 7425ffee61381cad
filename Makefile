# make demo | test | test-slow | check | format | bench | clean     (each does all the set-up it needs)
#
# PYTHON   interpreter to build the environment with, >= 3.11      VENV   where the environment goes
# PIP_ARGS anything pip should know, such as the index of PyTorch's CPU builds

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PIP_ARGS ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-torch211 test-triton36 check format bench clean

help:
	@sed -n '1,4p' Makefile

setup: $(READY)

# The stamp makes every later run instant; a change of the dependencies or of the pins rebuilds.
$(READY): pyproject.toml $(CONSTRAINTS)
	@bash .ci/needs "$(PYTHON)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c $(CONSTRAINTS) -e ".[test,dev]"
	@touch $@

demo: $(READY)
	$(BIN)/python examples/demo_wan.py $(DEMO_ARGS)
	$(BIN)/python examples/small_wan_video.py

test: $(READY)
	$(BIN)/python -m pytest -n 2 -m "not slow" $(PYTEST_ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -n 2 -m slow $(PYTEST_ARGS)

# The same fast suite on the oldest torch we support, in an environment of its own.
test-torch211: .venv-torch211/constraints.txt
	$(MAKE) test VENV=.venv-torch211 CONSTRAINTS=$<

.venv-torch211/constraints.txt: constraints.txt
	@mkdir -p $(@D)
	@sed -e 's/^torch==.*/torch==2.11.0/' -e 's/^triton==.*/triton==3.6.0/' -e 's/^setuptools==.*/setuptools<82/' $< > $@

# What GPU kernels compile to with the Triton of torch 2.11. Only Triton is installed a second time, in front of the other.
TRITON36 := .triton36
BINARY_TESTS := tests/gpu/test_binaries.py tests/gpu/test_training_binaries.py

test-triton36: $(READY) $(TRITON36)/.ready
	PYTHONPATH=$(CURDIR)/$(TRITON36) $(BIN)/python -c "import triton; assert triton.__version__ == '3.6.0', triton.__file__"
	PYTHONPATH=$(CURDIR)/$(TRITON36) $(BIN)/python -m pytest -n 2 -m "not slow" $(BINARY_TESTS) $(PYTEST_ARGS)

$(TRITON36)/.ready: | $(READY)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --no-deps --target $(TRITON36) triton==3.6.0
	@touch $@

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

format: $(READY)
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .

# Timing: run on a quiet machine. Results land in benchmarks/results and in README.md.
bench: $(READY)
	$(BIN)/python benchmarks/attention_cpu.py --json benchmarks/results/attention_cpu.json
	$(BIN)/python benchmarks/attention_cpu.py --lowering cpp --density 1.0 0.25 0.1 --precision float32 bfloat16 int8 --json benchmarks/results/attention_cpu_cpp.json
	$(BIN)/python benchmarks/attention_cpu.py --lowering cpp --density 1.0 0.25 0.1 --precision bfloat16 --flex --json benchmarks/results/attention_cpu_flex.json
	$(BIN)/python benchmarks/attention_cpu.py --lowering cpp --density 0.25 0.1 --backward --boxes --json benchmarks/results/attention_cpu_backward.json
	$(BIN)/python benchmarks/scaling_cpu.py --json benchmarks/results/scaling_cpu.json
	$(BIN)/python benchmarks/small_grids_cpu.py --json benchmarks/results/small_grids_cpu.json
	$(BIN)/python benchmarks/topk_cost.py --json benchmarks/results/topk_cost.json
	$(BIN)/python benchmarks/autotune_cpu.py --json benchmarks/results/autotune_cpu.json
	$(BIN)/python benchmarks/calibrate_cpu.py --json benchmarks/results/calibrate_cpu.json
	$(BIN)/python benchmarks/calibrate_trained.py --json benchmarks/results/calibrate_trained.json
	$(BIN)/python benchmarks/remainder.py --json benchmarks/results/remainder.json
	$(BIN)/python benchmarks/model_cpu.py
	$(BIN)/python benchmarks/training_cpu.py
	$(BIN)/python benchmarks/compile_time.py
	$(BIN)/python benchmarks/readme_figures.py
	$(BIN)/python benchmarks/speed_picture.py

clean:
	rm -rf .venv .venv-torch211 $(TRITON36) build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
