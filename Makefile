# `make help` lists the targets. All of them work in .venv, which the first one makes.

PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
SECONDS ?= 60
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests/cpp tests/fuzz -type f \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' \) 2>/dev/null)
# With RTP_MM_CUDA=1 the build holds the CUDA operators too, so it has a stamp of its own.
INSTALLED := $(VENV)/.installed$(if $(filter 1,$(RTP_MM_CUDA)),-cuda)

.PHONY: help demo test lint format fuzz clean

help:
	@echo 'make demo     start a server with random weights, send it a photograph, compare with Hugging Face'
	@echo 'make test     lint, then the tests'
	@echo 'make lint     ruff, mypy --strict, clang-format'
	@echo 'make format   format Python and C++'
	@echo 'make fuzz     header probe, resize and PNG rows under libFuzzer, SECONDS=60 each (needs clang)'
	@echo 'make clean    remove .venv, builds and the output of the demo'
	@echo
	@echo 'PYTHON=$(PYTHON)   interpreter that makes .venv, 3.11 or newer'
	@echo 'TORCH=$(TORCH)   what pip installs first; the README says how to ask for a CPU or CUDA build'

demo: $(INSTALLED)
	$(BIN)/python -m demo

test: lint
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(if $(CXX_FILES),$(BIN)/clang-format --dry-run -Werror $(CXX_FILES))

format: $(INSTALLED)
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format
	$(if $(CXX_FILES),$(BIN)/clang-format -i $(CXX_FILES))

fuzz: $(INSTALLED)
	$(MAKE) -C tests/fuzz PYTHON=$(abspath $(BIN)/python) SECONDS=$(SECONDS)

clean:
	rm -rf $(VENV) build dist demo_output *.egg-info rtp_mm/*.so

# torch first: the build of the extension takes its headers from here.
$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(TORCH)
	touch $@

$(INSTALLED): $(VENV)/.torch constraints.txt $(BUILD_INPUTS)
	$(BIN)/pip install -c constraints.txt -e '.[dev,gpu]'
	touch $@
