#!/usr/bin/env bash
# Installs the CUDA compiler from PyPI into build/nvcc; does nothing when it is there. Prints the CUDA_HOME to use.
# For builds and tests on machines without the CUDA toolkit: kernels compile here, they need no device for that.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=build/nvcc
if ! compgen -G "$venv/lib/python3*/site-packages/nvidia/cu13/bin/nvcc" >/dev/null; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install -q nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 \
        nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 >&2
fi
home=$(compgen -G "$PWD/$venv/lib/python3*/site-packages/nvidia/cu13" | head -n 1)
echo "$home"
