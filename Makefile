# `make demo` and `make test` do all set-up on a machine with python3 >= 3.11 and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := build/tiny-llava-ov-w3
BASELINE := build/tiny-llava-ov-fp32
FAST := not slow and not gpu and not network
SLOW := slow and not gpu and not network

.DEFAULT_GOAL := all
.PHONY: all setup demo test test-slow test-gpu lint fmt headers kernels dist clean

all: lint test

# Torch first and pinned: any other order pulls gigabytes of CUDA packages in.
$(VENV)/torch.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "python3 >= 3.11 is needed; name one with: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 3; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[cpu,rtx]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[cpu,rtx,triton,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/lean-11 \
	  tensorrt-lean-cu13-bindings==11.4.0.106  # the same module name as the one for 10.16, so a folder of its own
	touch $@

setup: $(VENV)/dev.stamp

demo: $(VENV)/demo.stamp
	$(BIN)/mbq-export build --model tiny-llava-ov --wbits 3 --target rtx4090:rtx -o $(DEMO) --force
	$(BIN)/mbq-export build --model tiny-llava-ov --wbits 16 --target cpu -o $(BASELINE) --force -q
	$(BIN)/mbq-export bench $(BASELINE) $(DEMO) -n 16 -r 10 --allow-noisy -o build/bench
	$(BIN)/mbq-export report $(DEMO) build/bench --html build/report.html
	@echo "bundle  $(abspath $(DEMO))"
	@echo "report  $(abspath build/report.html)"

# One thread for each of two workers: threads of two pools that wait for each other spin, and take ten times as long.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --durations=15 -m "$(FAST)"

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations=30 --timeout 900 -m "$(SLOW)"

# On a machine with a GPU a skipped test is a failure.
test-gpu: setup
	$(BIN)/python kernels/build.py
	$(BIN)/python -m pytest -m gpu
	$(BIN)/mbq-export bench --kernels --suite full -o docs/benchmarks

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=.:kernels $(BIN)/lint-imports
	$(BIN)/codespell

fmt: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Files that are made from others and checked in.
headers: setup
	$(BIN)/python -m mbq_export.schemes.layouts.header kernels/include/mbq/layout.h
	$(BIN)/python kernels/bench.py table

kernels:
	$(PYTHON) kernels/build.py

dist: setup
	$(BIN)/python -m build

clean:
	rm -rf build dist
