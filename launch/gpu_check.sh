#!/usr/bin/env bash
# All that a GPU can tell: ./launch/gpu_check.sh OUT_DIR [--part correctness|operators|step] [--dry-run]
#
# For a machine with a GPU, nvcc and a torch of 2.11 or newer with CUDA; no network. Builds in place, then runs one part
# of dsdistill/bench/gpu_check.py, or all three; each takes less than nine minutes with the build and is useful alone:
#
#   correctness  symbols of what was built; kernels that `auto` could take, against float64; tests on the GPU
#   operators    tiles of attention's kernels, kernels one by one, every operator beside its rivals: makes the record
#   step         24 layers of 1024 into 6 of 768 with more and more losses; largest kernels, sanitizer, a run
#
# Parts with the same OUT_DIR make one record, and `step` then uses what `operators` found to be the fastest. Results
# are written as soon as they are there. The last lines say what to change first. --dry-run does all of that on a CPU in
# tiny form: the build has no optimisation and a folder of its own, and WHEELS are used as usual.
#
#   ./launch/gpu_check.sh --wheels DIR
#
# This is run before, on a machine with a package index: it prints what the GPU's machine needs and fills DIR with it.
#
# PYTHON          interpreter that has torch (default python3)
# WHEELS          folder of wheels, made by --wheels; those of packages that are missing are installed from there, into
#                 a folder of their own
# HAVE            with --wheels: file with the output of `pip freeze` on the GPU's machine; what it names is left out
# PYTHON_VERSION  with --wheels: Python of the GPU's machine, such as 3.12 (default: that of PYTHON)
set -euo pipefail
[ $# -ge 1 ] || { echo "dsdistill: launch/gpu_check.sh: got nothing, expected OUT_DIR or --wheels DIR" >&2; exit 2; }
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
if [ "$1" = --wheels ]; then
  [ $# -eq 2 ] || { echo "dsdistill: --wheels: got $(($# - 1)) values, expected one folder" >&2; exit 2; }
  PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m dsdistill.bench.wheels "$2"
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
wheels=${WHEELS:+$(cd "$WHEELS" && pwd)}
cd "$root"
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" PATH="$site/bin:$PATH"

if [ -n "$wheels" ]; then
  # Wheels are installed one by one and without dependencies, so that torch is not replaced and a wheel that does not
  # fit costs only its own part.
  "$python" - "$wheels"/*.whl <<'PY' > "$site/missing"
import importlib.metadata, pathlib, sys
for wheel in sys.argv[1:]:
    try:
        importlib.metadata.version(pathlib.Path(wheel).name.split("-")[0])
    except importlib.metadata.PackageNotFoundError:
        print(wheel)
PY
  while read -r wheel; do
    "$python" -m pip install -q --no-index --no-deps --target "$site" "$wheel" 2>> "$out/log.txt" \
      && echo "== installed $(basename "$wheel")" || echo "== $(basename "$wheel") could not be installed (log.txt)"
  done < "$site/missing"
fi
missing=$("$python" - <<'PY'
import importlib.util
names = "pybind11 setuptools ninja deepspeed omegaconf pydantic typer yaml transformers accelerate pytest matplotlib"
names += " hypothesis scipy tqdm"
print(*(name for name in names.split() if importlib.util.find_spec(name) is None))
PY
)
[ -z "$missing" ] || echo "== missing: $missing (WHEELS may name a folder, filled by --wheels)"

build=(setup.py build_ext --inplace)
limit=75
case " $* " in *" --dry-run "*)
  export DSDISTILL_CFLAGS="-O0 -g0"
  limit=750
  build=(setup.py build_ext --build-lib "$site/build" --build-temp "$site/build") ;;
esac
start=$SECONDS
# If the build fails, setup.py only warns and installs without native operators.
if MAX_JOBS=$(nproc) timeout $limit "$python" "${build[@]}" 2>&1 | tee "$site/build.log" >> "$out/log.txt" \
  && ! grep -q 'building extension "dsdistill._C" failed' "$site/build.log"; then
  echo "== build: passed ($((SECONDS - start)) s)"
  # A dry run builds into a folder of its own, so its symbols are checked there.
  for library in "$site"/build/dsdistill/_C*.so; do [ ! -e "$library" ] || export DSDISTILL_BUILT=$library; done
else
  echo "== build: failed (log.txt); the rest goes on with what is there"
fi
"$python" -m dsdistill.bench.gpu_check "$out" "$@"
