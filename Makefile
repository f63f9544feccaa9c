# make demo: set up, think and paint once, without torch.   make test: set up, then lint, types and tests.
PYTHON ?= python3
VENV ?= .venv
DEMO := $(VENV)-demo
# torch from the package index brings gigabytes of CUDA libraries; a CPU build, where pip finds one, is this exact version.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2

.PHONY: demo test lint clean

demo: $(DEMO)/.demo
	$(DEMO)/bin/python -m mindomni_rt demo --out out/demo.png

test: $(VENV)/.dev lint
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(DEMO)/.demo: pyproject.toml
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python -m pip install -q -e ".[onnx]"
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(DEMO) out .pytest_cache .mypy_cache .ruff_cache
