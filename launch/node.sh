#!/usr/bin/env bash
# Trains on all GPUs of this node: ./launch/node.sh CONFIG.yaml [FILE.yaml | KEY=VALUE ...]
#   ./launch/node.sh configs/bert_large_to_6.yaml configs/deepspeed/zero3.yaml
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { echo "dsdistill: launch/node.sh: got nothing, expected CONFIG.yaml [KEY=VALUE ...]" >&2; exit 2; }
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"

gpus=$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)
[ "$gpus" -gt 0 ] || { echo "dsdistill: launch/node.sh: got no GPU, expected at least one that nvidia-smi lists" >&2; exit 2; }
# The ranks share the cores of the host; NUMA pinning would need numactl and deepspeed's --bind_cores_to_rank.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / gpus))}
trap '' INT # Ctrl-C then reaches the ranks through the launcher's second process, which waits until they have saved
exec deepspeed --num_gpus "$gpus" --module dsdistill train "$@"
