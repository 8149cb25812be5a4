# Two commands do all the set-up: `make demo` and `make test`.
# On Linux the default PyPI wheel of torch brings CUDA libraries (gigabytes); for the CPU build alone:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
# Measured on 2 cores: two workers with one thread each beat one worker with two.
WORKERS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CORE := $(VENV)/.core-installed
DEV := $(VENV)/.dev-installed
TORCHVISION_VENV ?= .venv-torchvision
TORCHVISION := $(TORCHVISION_VENV)/.installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.PHONY: help venv demo test test-all test-torchvision check lint docs clean

help:
	@echo "make demo    install into $(VENV) and run the main job on the bundled model"
	@echo "make test    all tests but those of every single model family"
	@echo "make test-all    the tests of every model family"
	@echo "make test-torchvision    families whose processors need torchvision, in an environment of its own (gigabytes)"
	@echo "make check   ruff, format, mypy --strict, import contracts, fast tests"
	@echo "make docs    write docs/cli.md from the commands' help"

demo: $(CORE)
	$(BIN)/vlmexport demo

venv: $(DEV)

test: $(DEV)
	$(PYTEST) -m "not family"

test-all: $(DEV)
	$(PYTEST) -m family

# torchvision has no CPU build that pip finds beside torch's; the CUDA build (gigabytes) runs on a CPU, too.
test-torchvision: $(TORCHVISION)
	OMP_NUM_THREADS=1 $(TORCHVISION_VENV)/bin/python -m pytest tests/torchvision

$(TORCHVISION): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TORCHVISION_VENV)
	$(TORCHVISION_VENV)/bin/python -m pip --disable-pip-version-check install -q "torch===2.13.0" "torchvision==0.28.0" "timm==1.0.31"
	$(TORCHVISION_VENV)/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt \
		-e . num2words pytest pytest-timeout
	@touch $@

check: lint
	$(PYTEST) -m "not slow and not family"

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(DEV)
	$(BIN)/python tools/write_cli_reference.py

clean:
	rm -rf $(VENV) build dist *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; set PYTHON=python3.x"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# torch first and alone: only so is its wheel taken from TORCH_INDEX and everything else from the usual index.
$(CORE): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) install -q -c constraints.txt -e .
	@touch $@

$(DEV): $(CORE)
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	@touch $@
