#!/usr/bin/env bash
# The main job in small, from a fresh clone: ./launch/quickstart.sh [KEY=VALUE ...]
# Sets .venv up, then distils on two ranks: teacher under ZeRO-3, student under ZeRO-2, all four levels aligned.
source "$(dirname "$0")/setup.sh"

gpus=$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)
ranks=2
if [ "$gpus" = 1 ]; then ranks=1; fi # two ranks cannot share one GPU
say "distilling on $ranks rank(s): configs/quickstart.yaml (results in runs/quickstart)"
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
trap '' INT # Ctrl-C then reaches the ranks through the launcher's second process, which waits until they have saved
exec deepspeed --num_gpus "$ranks" --master_port "$port" --module dsdistill train configs/quickstart.yaml "$@"
