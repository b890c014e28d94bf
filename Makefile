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

.PHONY: setup test demo lint bench clean again compile-gpu test-simulated test-gpu bench-gpu gpu

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
	@! command -v nvcc >/dev/null || $(BIN)/python -c 'from engine.kernels.op import cuda_not_built; \
		print("setup:", cuda_not_built() or "the CUDA kernels are ready")'
	@touch $@

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy engine rl forge benchmarks

test: setup lint
	@CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest  # GPUs have a target of their own

demo: setup
	@$(BIN)/python -m rl demo

# Every benchmark, written to benchmarks/results/<machine>.md (minutes; the machine should be idle).
bench: setup
	@$(BIN)/python -m benchmarks --models $(MODELS)

# Every Triton kernel in every dtype, compiled for GPUs that need not be here (minutes; `make test` does bfloat16 only).
compile-gpu: setup
	@env -u TRITON_INTERPRET $(BIN)/python -m benchmarks.compile

# The tests of Triton's kernels on what the compiler makes of them for Hopper, in the simulator of PTX, in every dtype.
test-simulated: setup
	@env TRITON_INTERPRET=0 CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -p tests.ptx.plugin \
		--ignore tests/kernels/triton/test_engine.py --ignore tests/kernels/triton/test_reduction_layouts.py \
		tests/ptx/kernels tests/kernels/triton

# On a machine with a GPU, whose own python has a CUDA build of torch: nothing is installed, the extensions are built in
# place for that python. Unproven: no GPU has run these targets yet.
gpu:
	@$(PYTHON) -c 'import jinja2, msgspec, numpy, pybind11, pytest, rich, safetensors, setuptools, sys, tokenizers, torch, triton; \
		sys.exit(not torch.cuda.is_available() and "torch sees no GPU")' || { echo "error: $(PYTHON) needs a GPU," \
		"torch and triton for it, and what is named above (make PYTHON=...)"; exit 1; }
	@$(PYTHON) setup.py --quiet build_ext --inplace
	@$(PYTHON) -c 'from engine.kernels.op import cpu_missing, cuda_not_built; \
		print("gpu:", cpu_missing() or "the C++ kernels are ready"); print("gpu:", cuda_not_built() or "the CUDA kernels are ready")'
	@$(PYTHON) -c 'import sys, torch, triton; \
		print("gpu:", torch.cuda.get_device_name(), "torch", torch.__version__, "Triton", triton.__version__, sys.version.split()[0])'

test-gpu: gpu
	@$(PYTHON) -m tests.on_gpu tests/test_exactness.py tests/kernels/triton tests/kernels/cuda tests/kernels/hopper
	@if $(PYTHON) -c 'import hypothesis, torch, sys; sys.exit(torch.cuda.device_count() < 4)' 2>/dev/null; \
		then $(PYTHON) -m pytest tests/parallel; \
		else echo "test-gpu: ranks on GPUs (NCCL) were not tested; that takes four GPUs, and hypothesis"; fi
	@! command -v compute-sanitizer >/dev/null || \
		compute-sanitizer --error-exitcode=1 $(PYTHON) -m tests.kernels.cuda.sanitized

# Every op at the shapes of an 8B model, beside the best that torch has, into benchmarks/results/<gpu>.md.
bench-gpu: gpu
	@$(PYTHON) -m benchmarks --device cuda --models llama-8b --only kernels

clean:
	rm -rf $(VENV) build *.egg-info engine/_C*.so engine/_cuda*.so
