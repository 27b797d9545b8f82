#!/usr/bin/env bash
# Set-up, then the main job on the built-in data with 2 processes:   launch/demo.sh [overrides]
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

"$project_dir/launch/setup.sh"
# Two processes cannot share the only GPU of a machine: NCCL refuses.
NPROC=${NPROC:-$(($(num_gpus "$@") == 1 ? 1 : 2))}
export NPROC PYTHON=$project_dir/.venv/bin/python
exec "$project_dir/launch/local.sh" "$@"
