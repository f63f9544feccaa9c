# make demo: set up, think and paint once, without torch.   make test: set up, then all checks.   make ci: the slow ones too.
PYTHON ?= python3
VENV ?= .venv
DEMO := $(VENV)-demo
# torch from the package index brings gigabytes of CUDA libraries; a CPU build, where pip finds one, is this exact version.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
# Tests run in as many processes as there are cores, with one thread each.
JOBS ?= auto
export OMP_NUM_THREADS ?= 1

.PHONY: demo test suite ci lint docs package clean

demo: $(DEMO)/.demo
	$(DEMO)/bin/python -m mindomni_rt demo --out out/demo.png

test: lint suite

suite: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# Each of the first two keeps one core busy; the suite takes all.
ci: $(VENV)/.dev
	$(MAKE) -j2 --output-sync=target lint package
	$(MAKE) suite

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest tests/test_words.py tests/test_public_api.py

docs: $(VENV)/.dev
	$(BIN)/python -m mkdocs build --strict

package: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow tests/test_wheel.py

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
	rm -rf $(VENV) $(DEMO) out dist .pytest_cache .mypy_cache .ruff_cache
