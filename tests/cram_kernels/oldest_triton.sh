#!/bin/sh
# Compiled kernels on the oldest Triton that pyproject.toml allows, which is what GPU machines have:
#   sh tests/cram_kernels/oldest_triton.sh [folder of the environment]
# Makes the environment once. Its torch is the CPU build, which is enough to compile.
set -e
environment=${1:-build/triton-3.6}
if [ ! -x "$environment/bin/pytest" ]; then
  python3 -m venv "$environment"
  "$environment/bin/pip" install -q --no-deps triton==3.6.0
  "$environment/bin/pip" install -q torch==2.13.0 'numpy<2.4' pytest hypothesis safetensors
fi
OMP_NUM_THREADS=1 "$environment/bin/python" -m pytest -q tests/cram_kernels/test_aot.py tests/cram_kernels/test_host.py
