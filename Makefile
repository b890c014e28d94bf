# `make demo` and `make test` set up whatever they need first; nothing else has to be run before them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input

REQUIREMENTS := requirements.txt requirements-dev.txt
SOURCES := setup.py pyproject.toml $(shell find engine/csrc -type f)
# The stamp alone is not enough: the compiled file may have been cleaned away, or g++ installed since.
RECOMPILE := $(if $(wildcard engine/_C*.so),,again)
MODELS ?= llama-110m

.PHONY: setup test demo lint bench clean again

setup: $(VENV)/extension.stamp

$(VENV)/requirements.stamp: $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $$($(PYTHON) --version 2>&1) is too old; Python 3.11 or newer is needed (make PYTHON=python3.11)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "error: $(PYTHON) cannot make virtual environments; install it with: apt install python3-venv"; exit 1; }
	@echo "setup: installing the pinned requirements into $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) -r requirements-dev.txt
	@touch $@

$(VENV)/extension.stamp: $(VENV)/requirements.stamp $(SOURCES) $(RECOMPILE)
	@command -v g++ >/dev/null || \
		echo "setup: no g++ here, so the C++ kernels are left out and the slow torch definitions serve (apt install g++)"
	@echo "setup: compiling the extension and installing the package"
	@$(BIN)/python setup.py --quiet build_ext --inplace  # by itself first: pip would hide what the compiler says
	@$(PIP) --no-deps --no-build-isolation -e .
	@$(BIN)/python -c 'from engine.kernels.op import cpu_missing; print("setup:", cpu_missing() or "the C++ kernels are ready")'
	@touch $@

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy engine rl forge benchmarks

test: setup lint
	@$(BIN)/python -m pytest

demo: setup
	@$(BIN)/python -m rl demo

# Every benchmark, written to benchmarks/results/<machine>.md (minutes; the machine should be idle).
bench: setup
	@$(BIN)/python -m benchmarks --models $(MODELS)

clean:
	rm -rf $(VENV) build *.egg-info engine/_C*.so
