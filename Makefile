# `make demo` and `make test` set up everything they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(BIN)/structconv convert sample_models/resnet20_digits.pt \
	    --arch sample_models/resnet_cifar.py:resnet20 --arch-arg in_channels=1 \
	    --data digits --force
	$(BIN)/structconv verify
	$(BIN)/structconv benchmark --device cpu

test: $(VENV)/installed-test
	$(BIN)/python -m pytest

lint: $(VENV)/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# PyPI's torch for Linux brings gigabytes of CUDA libraries. For the CPU build:
# make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP = $(BIN)/python -m pip install -q -c constraints.txt $(PIP_ARGS)

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "structconv needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) -e '.[test]'
	touch $@

$(VENV)/installed-lint: $(VENV)/installed
	$(PIP) -e '.[lint]'
	touch $@

clean:
	rm -rf $(VENV) structconv-run
