#!/usr/bin/env bash
# All that a GPU can tell, in under nine minutes: ./launch/gpu_check.sh OUT_DIR [--only PART] [--dry-run]
#
# For a machine with a GPU, nvcc and a torch of 2.11 or newer with CUDA; no network. Builds in place, then runs the
# parts of dsdistill/bench/gpu_check.py (verify, bench, lengths, job, tests, aot, sanitizer), each within its budget.
#
# PYTHON   interpreter that has torch (default python3)
# WHEELS   folder of wheels; packages that are missing are installed from there, into a folder of their own
set -euo pipefail
[ $# -ge 1 ] || { echo "dsdistill: launch/gpu_check.sh: got nothing, expected OUT_DIR" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" PATH="$site/bin:$PATH"

missing=$("$python" - <<'PY'
import importlib.util
names = {"pybind11": "pybind11", "setuptools": "setuptools", "ninja": "ninja", "deepspeed": "deepspeed"}
names |= {"omegaconf": "omegaconf", "pydantic": "pydantic", "typer": "typer", "yaml": "pyyaml"}
names |= {"transformers": "transformers", "pytest": "pytest", "matplotlib": "matplotlib", "hypothesis": "hypothesis"}
names |= {"scipy": "scipy", "accelerate": "accelerate"}
print(*(package for module, package in names.items() if importlib.util.find_spec(module) is None))
PY
)
if [ -n "$missing" ]; then
  echo "== missing: $missing"
  if [ -n "${WHEELS:-}" ]; then
    # One by one, so that a missing wheel costs its own part alone; torch and triton stay what they are.
    "$python" -m pip freeze 2>/dev/null | grep -iE '^(torch|triton|numpy)==' > "$site/pins" || true
    for package in $missing; do
      "$python" -m pip install -q --no-index --find-links "$WHEELS" --target "$site" -c "$site/pins" "$package" \
        || echo "== $package could not be installed from $WHEELS"
    done
    # --target cannot see what is there already; a second torch must not hide the first.
    rm -rf "$site"/torch "$site"/torch-* "$site"/triton "$site"/triton-* "$site"/nvidia* "$site"/numpy "$site"/numpy-* "$site"/numpy.libs
  fi
fi

case " $* " in
  *" --dry-run "*) ;;
  *) MAX_JOBS=$(nproc) timeout 75 "$python" setup.py build_ext --inplace >> "$out/log.txt" 2>&1 \
       || echo "== the build failed (log.txt); without its CUDA kernels the rest goes on" ;;
esac
"$python" -m dsdistill.bench.gpu_check "$out" "$@"
