#!/usr/bin/env bash
# Installs the project and runs the tests:   launch/test.sh [pytest arguments]
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

"$project_dir/launch/setup.sh"
cd "$project_dir"
unset PYTHONDONTWRITEBYTECODE # without bytecode, each of the hundreds of processes compiles for a second
exec .venv/bin/python -m pytest "$@"
