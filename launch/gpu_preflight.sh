#!/usr/bin/env bash
# All that can be checked of the GPU code without a GPU: ./launch/gpu_preflight.sh ENV_DIR [--match TEXT] [--write]
#
# Makes an environment in ENV_DIR (6 GB from the package index; kept for the next time) with the oldest torch that is
# supported, in its CUDA build, and nvcc. Builds the extension there and loads it, then compiles every kernel for sm_80,
# 86, 89 and 90 and compares it with the table under dsdistill/bench/results/preflight/. Fails on a regression.
# Arguments after ENV_DIR go to dsdistill/bench/preflight.py. To check the Triton of another environment, run there:
#   python -m dsdistill.bench.preflight
#
# PYTHON   interpreter to start from (default python3; 3.11 or newer)
set -euo pipefail
case "${1:---}" in -*) echo "dsdistill: launch/gpu_preflight.sh: got no folder, expected ENV_DIR" >&2; exit 2 ;; esac
mkdir -p "$1"
home=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1
say() { printf '== %s (%s s)\n' "$*" "$SECONDS"; }

[ -x "$home/bin/python" ] || "${PYTHON:-python3}" -m venv "$home"
python=$home/bin/python
stamp=$(cat launch/gpu_preflight.sh launch/constraints.txt | sha256sum)
if [ "$(cat "$home/preflight-stamp" 2>/dev/null)" != "$stamp" ]; then
  # torch 2.11.0 brings the CUDA 13.0 runtime and Triton 3.6.0, and takes no newer setuptools than 81.
  "$python" -m pip install -q torch==2.11.0 'setuptools>=77,<82' nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 \
    nvidia-nvvm==13.0.88 nvidia-cuda-cccl==13.0.85
  grep -v '^setuptools==' launch/constraints.txt > "$home/constraints.txt"
  "$python" -m pip install -q -c "$home/constraints.txt" wheel pybind11 ninja numpy omegaconf pydantic tqdm
  printf '%s' "$stamp" > "$home/preflight-stamp"
fi
CUDA_HOME=$(echo "$home"/lib/python3*/site-packages/nvidia/cu13)
export CUDA_HOME PATH="$home/bin:$CUDA_HOME/bin:$PATH" PYTHONPATH=$PWD
say "environment ready"
python setup.py build_ext --build-lib "$home/build/lib" --build-temp "$home/build/temp" > "$home/build.log" 2>&1
! grep -q 'building extension "dsdistill._C" failed' "$home/build.log" || { tail -5 "$home/build.log"; exit 1; }
python -m dsdistill.bench.preflight --library "$home"/build/lib/dsdistill/_C*.so
say "extension built and loaded"
status=0
python -m dsdistill.bench.preflight "$@" || status=$?
say "kernels compiled"
exit $status
