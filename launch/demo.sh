#!/usr/bin/env bash
# Installs the project, trains on the built-in data with 2 processes, and writes a report:
#   launch/demo.sh [overrides]
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

"$project_dir/launch/setup.sh"
# NCCL does not let two processes share a GPU, so a machine with one GPU gets one process.
NPROC=${NPROC:-$(($(num_gpus "$@") == 1 ? 1 : 2))}
export NPROC PYTHON=$project_dir/.venv/bin/python
exec "$project_dir/launch/local.sh" logger.report=true "$@"
