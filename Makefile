# `make demo`, `make serve` and `make test` need only Python >= 3.11: each installs what it lacks into .venv, once.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

# Nothing is fetched at run time: the demo's model and data come with the package.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo serve test lint versions peer-tests vllm-tests swift-tests zero-tests readme bench gpu headers sanitize mutants clean

demo: .venv/.installed-hf
	@$(BIN)/cram demo --out runs/demo

serve: .venv/.installed-hf,serve
	@$(BIN)/cram serve

test: lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4

lint: .venv/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/mypy

# The tests that depend on transformers, under the oldest and the newest supported version.
versions:
	@PYTHON='$(PYTHON)' TORCH='$(TORCH)' .ci/versions

# transformers' own model tests, plain and with experts; its source archive goes into build/peers.
peer-tests: .venv/.installed-dev
	@$(BIN)/python -m tests.peers.run build/peers

# Every block of README.md in fresh environments: with and without a compiler, the oldest torch, a newer Python. A newer
# torch by `.ci/readme newest-torch`.
readme:
	@PYTHON='$(PYTHON)' TORCH='$(TORCH)' .ci/readme

# The tests against a real vLLM on a CPU, in an environment of their own (2.2 GB).
vllm-tests:
	@PYTHON='$(PYTHON)' TORCH='$(TORCH)' .ci/vllm/run

# The test of the ms-swift tuner against a real ms-swift, in an environment of its own.
swift-tests:
	@PYTHON='$(PYTHON)' TORCH='$(TORCH)' .ci/swift

# The test of ZeRO-2 against a real DeepSpeed in two processes on a CPU, in an environment of its own.
zero-tests:
	@PYTHON='$(PYTHON)' TORCH='$(TORCH)' .ci/zero

bench: .venv/.installed-hf
	@$(BIN)/python -m benchmarks --quick

# Everything that a CUDA machine can settle, in ten minutes. Installs nothing: takes .venv if it is there, else the
# python that has the CUDA build of torch.
gpu:
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks gpu

# What the slow tests of csrc/ compile against; two wheels of about 550 MB, of which the headers are kept.
headers: .venv/.installed-dev
	@$(BIN)/python -m tests.csrc.torch_headers 2.11.0 newest

# The CPU library with the address and undefined-behaviour sanitizers, under its tests and 3,000 random calls.
sanitize: .venv/.installed-dev
	@$(BIN)/python -m tests.csrc.sanitized

# Break the sources in one place at a time and count what the tests notice; about an hour, goes on where it was stopped.
mutants: .venv/.installed-dev
	@$(BIN)/python -m benchmarks mutants --seed 1 --each 8

clean:
	@rm -rf .venv runs build dist *.egg-info cram_kernels/*.so cram_kernels/native.json .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and pinned: it decides between the CPU and the CUDA build, and every other requirement on it is then met.
.venv/.installed-%: pyproject.toml csrc/build.py $(wildcard csrc/*.[ch]* csrc/*/*.[ch]*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python must be >= 3.11, got {sys.version.split()[0]}")'
	@echo "installing cram[$*] into .venv (once)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(TORCH)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[$*]'
	@touch $@
