#!/usr/bin/env bash
# Sets .venv up and runs the tests: ./launch/test.sh [PYTEST ARGUMENT ...]
source "$(dirname "$0")/setup.sh"

say "running the tests"
exec python -m pytest "$@"
