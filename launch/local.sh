#!/usr/bin/env bash
# Trains on all devices of this machine:   launch/local.sh [overrides]
#   NPROC=2    processes; default: one a CUDA device that is visible (CUDA_VISIBLE_DEVICES counts), else one
#   COMMAND=doctor   examines this machine instead: alexnet_ddp/doctor/command.py
#   PYTHON     default: .venv/bin/python, else python3
# After a crash or a hang it starts the run again, RESTART_DELAY=2 seconds later.
# Exit code: the run's (0 complete, 64 configuration, 65 data, ..., 75 stopped, what was trained is saved; 93: three restarts in vain).
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
listen

# On a CPU one process uses all cores; more would only add copies of the model and exchange gradients between them.
gpus=$(num_gpus "$@")
NPROC=${NPROC:-$((gpus > 0 ? gpus : 1))}
choose_module
check_number NPROC "$NPROC" 1 "leave it unset for all devices"

keep_running "$NPROC" --standalone --local-addr=127.0.0.1 -m "$module" "$@"; exit # on this line: bash would read on in a file that may be another one by then
