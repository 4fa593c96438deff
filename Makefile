PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready$(if $(LOCKED),-locked)
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest
TWO    := -n 2 --dist worksteal
# With LOCKED=1 the versions that were tested, of every library; else the newest that the ranges allow.
PINNED := $(if $(LOCKED),--constraint requirements.lock)
TPU    := $(abspath $(VENV))/tpu-compiler
GPU    := $(abspath $(VENV))/gpu-compiler
FLASH  := $(abspath $(VENV))/torch-for-gpus
TOOLS  := $(abspath $(VENV))/launch-tools
TORCH  := $(abspath $(VENV))/transformers
# The build for CPUs, 0.2 GB; PyTorch's own index, where it is, must be among those of pip. The build for
# Linux on PyPI does not start without 3 GB of CUDA libraries; elsewhere TORCH_OF_CPU=torch does.
TORCH_OF_CPU ?= torch==2.13.0+cpu
PYTHON_OF_XPK ?= python3.12
PYTHON_OF_LOCK ?= python3.11
BROWSERS := chromium chromium-browser google-chrome google-chrome-stable chrome

# CUDA 13 needs a driver from 580 on; older ones get CUDA 12.
NVIDIA := $(wildcard /dev/nvidia[0-9]*)
DRIVER := $(shell sed -nE 's/^NVRM.* ([0-9]{3,})\.[0-9.]+ .*/\1/p' /proc/driver/nvidia/version 2>/dev/null)
CUDA   := cuda$(shell test "$(DRIVER)" && test "$(DRIVER)" -lt 580 && echo 12)

# Linear algebra written for processors with AVX-512 cannot run on others.
SKYLAKE := $(shell grep -qs avx512bw /proc/cpuinfo && echo test-skylake)

.PHONY: smoke test test-compiler test-slow test-tools torch test-transformers test-processors lint
.PHONY: types bench bench-transformers lock clean accelerator
.PHONY: test-browser test-haswell test-skylake test-zen test-sse test-avx2

smoke: $(READY)  ## train, forecast, fit and answer the smoke study; the second time only print the answer
	$(BIN)/gqa-scaling prepare experiments.smoke
	$(BIN)/gqa-scaling run experiments.smoke --workers 2 --only 'L[23]-*'
	$(BIN)/gqa-scaling run experiments.smoke --workers 2 --forecast experiments.smoke
	$(BIN)/gqa-scaling report experiments.smoke

test: $(READY)  ## the tests, about twelve minutes
	$(PYTEST) $(TWO)

# XLA_FLAGS, even empty, has the tests compile as users do (tests/conftest.py).
test-compiler: $(READY)  ## the golden steps and a run that is killed, as users compile them
	XLA_FLAGS= $(PYTEST) $(addprefix tests/training/test_training_,golden.py kill.py)

test-slow: $(READY) $(TPU)/.ready $(GPU)/.ready test-processors  ## the tests that take minutes each, with the compilers for TPUs and GPUs
	XLA_FLAGS= JAX_PLATFORMS=cpu PYTHONPATH=$(TPU) GQA_SCALING_GPU_COMPILER=$(GPU) $(PYTEST) -m slow

# OpenBLAS, NumPy and XLA choose their code by the processor, and each choice rounds in its own way.
test-processors: test-haswell $(SKYLAKE) test-zen test-sse test-avx2  ## the numbers, as other processors compute them

test-haswell: export OPENBLAS_CORETYPE = Haswell
test-skylake: export OPENBLAS_CORETYPE = SkylakeX
test-zen: export OPENBLAS_CORETYPE = Zen
test-sse: export NPY_DISABLE_CPU_FEATURES = X86_V3 X86_V4
test-haswell test-skylake test-zen test-sse: $(READY)
	$(PYTEST) $(TWO) tests/study

test-avx2: export XLA_FLAGS = --xla_cpu_max_isa=AVX2
test-avx2: $(READY)
	$(PYTEST) $(TWO) tests/model tests/training

test-tools: $(READY) $(TOOLS)/.ready  ## what SkyPilot and xpk themselves say of the renderings
	GQA_SCALING_TOOLS=$(TOOLS) $(PYTEST) -m tools

test-browser: $(READY)  ## the page of a report, moved in a browser without a window; needs Chromium or Chrome
	@for name in $(BROWSERS); do command -v $$name >/dev/null && exit 0; done; \
	echo "test-browser needs a browser on PATH, one of $(BROWSERS): apt install chromium"; exit 2
	$(PYTEST) -m browser

test-transformers: $(TORCH)/.ready  ## exports, imports and lm-eval, as PyTorch and transformers have them
	$(TORCH)/bin/python -m pytest tests/inference tests/test_accelerator_torch.py

bench-transformers: $(TORCH)/.ready  ## a training step and decoding beside transformers
	$(TORCH)/bin/python benchmarks/step.py
	$(TORCH)/bin/python benchmarks/generate.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## static types of the package, the launchers and the experiments
	$(BIN)/mypy

bench: $(READY)  ## timed comparisons; read benchmarks/ for single ones
	for file in $(filter-out $(addprefix benchmarks/,generate.py torch_llama.py accelerator%),$(wildcard benchmarks/*.py)); do $(BIN)/python $$file || exit; done

$(READY): requirements.txt pyproject.toml $(if $(LOCKED),requirements.lock)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else "gqa_scaling needs Python 3.11, 3.12 or 3.13, this is %d.%d; try make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(PINNED) -r requirements.txt
	$(PIP) $(PINNED) -e ".[dev]"
	touch $@

# What is measured beside ours is another framework, in an environment of its own; without it, all the
# rest is measured all the same.
accelerator: $(READY)  ## whether this machine's GPU or TPU is right, then how fast: docs/accelerators.md
	$(if $(NVIDIA),$(PIP) $(PINNED) -e ".[$(CUDA)]",$(if $(wildcard /dev/accel* /dev/vfio/[0-9]*),$(PIP) $(PINNED) -e ".[tpu]"))
	-$(BIN)/gqa-scaling doctor
	$(BIN)/python benchmarks/accelerator.py --only attention steps gradients --minutes 8
	$(if $(NVIDIA),-$(MAKE) $(FLASH)/.ready)
	$(BIN)/python benchmarks/accelerator.py $(if $(NVIDIA),$$(test -e $(FLASH)/.ready && echo --torch $(FLASH)/bin/python))

$(FLASH)/.ready:
	rm -rf $(FLASH)
	$(PYTHON) -m venv $(FLASH)
	$(FLASH)/bin/python -m pip install --quiet --disable-pip-version-check torch
	touch $@

# XLA for NVIDIA GPUs, of this jaxlib's version: it compiles without a GPU and without CUDA's libraries.
$(GPU)/.ready: $(READY)
	rm -rf $(GPU)
	$(PIP) --no-deps --target $(GPU) \
		$$($(BIN)/python -c 'from jaxlib import __version__ as v; print(f"jax-cuda13-plugin=={v} jax-cuda13-pjrt=={v}")')
	touch $@

# The libtpu that this jax names, beside the environment: inside it, jax would look for a TPU.
$(TPU)/.ready: $(READY)
	rm -rf $(TPU)
	$(PIP) --no-deps --target $(TPU) \
		"$$($(BIN)/python -c 'from importlib.metadata import requires; print(next(r.split(";")[0] for r in requires("jax") if r.startswith("libtpu")))')"
	touch $@

torch: $(TORCH)/.torch  ## PyTorch for CPUs, where pip finds it, for test-transformers

# Beside the environment, as it is large and none of it is needed to train.
$(TORCH)/.torch:
	rm -rf $(TORCH)
	$(PYTHON) -m venv $(TORCH)
	$(TORCH)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH_OF_CPU)
	touch $@

$(TORCH)/.ready: $(TORCH)/.torch requirements.txt pyproject.toml $(if $(LOCKED),requirements.lock)
	$(TORCH)/bin/python -m pip install --quiet --disable-pip-version-check $(PINNED) \
		-r requirements.txt -e ".[harness]" pytest pytest-xdist hypothesis \
		'transformers>=5.23,<6' accelerate
	touch $@

# Both ask for versions of libraries that are not ours; xpk also for Python 3.12.
$(TOOLS)/.ready: $(READY)
	rm -rf $(TOOLS)
	$(PYTHON) -m venv $(TOOLS)/skypilot
	$(TOOLS)/skypilot/bin/python -m pip install --quiet --disable-pip-version-check 'skypilot>=0.14,<0.15'
	$(PYTHON_OF_XPK) -m venv $(TOOLS)/xpk
	$(TOOLS)/xpk/bin/python -m pip install --quiet --disable-pip-version-check 'xpk>=1.16,<1.17'
	touch $@

# The oldest Python takes the oldest versions, which the newer ones can install as well.
lock:  ## write requirements.lock anew: the newest versions that the ranges allow; then run the tests
	rm -rf $(VENV)/lock
	$(MAKE) VENV=$(VENV)/lock PYTHON=$(PYTHON_OF_LOCK) LOCKED= $(VENV)/lock/.ready
	(grep '^#' requirements.lock; $(VENV)/lock/bin/python -m pip freeze --exclude-editable) > $(VENV)/lock/new
	mv $(VENV)/lock/new requirements.lock

clean:  ## remove the environment and caches; runs/ and data/ stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
