#!/usr/bin/env bash
# The main job on a small scale, from a fresh clone: ./launch/quickstart.sh [KEY=VALUE ...]
# Sets .venv up. Then three students with the same layers learn on two ranks: from the pairs alone, from the teacher
# alone, and from both. The teacher is under ZeRO-3, the students under ZeRO-2. At the end come a table and searches.
source "$(dirname "$0")/setup.sh"

gpus=$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)
ranks=2
if [ "$gpus" = 1 ]; then ranks=1; fi # two ranks cannot share one GPU
dtype=fp32 # bf16 only where it is faster: with AVX-512 alone its products take twice as long as those of fp32
if [ "$gpus" != 0 ] || grep -qw amx_bf16 /proc/cpuinfo 2>/dev/null; then dtype=bf16; fi
runs=runs/quickstart
if [ -e "$runs/config.yaml" ]; then # else its own page would be made instead of the table
  fail "$runs: got a run that an earlier quickstart left, expected no such folder (move it away)"
fi
trap '' INT # Ctrl-C then reaches the ranks through the launcher's second process, which waits until they have saved

# The same command continues a run that was stopped, and skips runs that are finished.
train() {
  local name=$1 config=$2 port
  shift 2
  say "$name on $ranks rank(s) in $dtype: $config $*"
  port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  deepspeed --num_gpus "$ranks" --master_port "$port" --module dsdistill train "$config" train.dtype="$dtype" "$@" \
    run.dir="$runs/$name"
}
train no-teacher configs/quickstart.yaml configs/quickstart/no_teacher.yaml "$@"
train distilled-without-pairs configs/quickstart.yaml configs/quickstart/without_pairs.yaml "$@"
train distilled-with-pairs configs/quickstart.yaml "$@"

say "the page $runs/report.html"
python -m dsdistill report "$runs"
python -m dsdistill export "$runs/distilled-with-pairs" --out "$runs/encoder"
say "three searches: launch/examples/search.py $runs/encoder [QUERY ...]"
python launch/examples/search.py "$runs/encoder"
