#!/usr/bin/env bash
# Trains on all devices of this machine:   launch/local.sh [overrides]
#   NPROC=2          number of processes; default: one per visible CUDA device, or one
#   COMMAND=doctor   checks this machine instead of training
#   PYTHON           default: .venv/bin/python, else python3
#   RESTART_DELAY=2  seconds before a run that crashed or hung is started again
# Exit code: the run's (0 complete, 64 configuration, 65 data, ..., 75 or 79 stopped and saved), or
# 93 after three restarts without progress. A stopped run that `wandb agent` started: 0.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
listen

# On CPUs one process uses all cores; more processes would only add replicas and communication.
gpus=$(num_gpus "$@")
NPROC=${NPROC:-$((gpus > 0 ? gpus : 1))}
choose_module
check_number NPROC "$NPROC" 1 "leave it unset for all devices"
started_by_agent=${WANDB_SWEEP_ID:-}

# `exit` is on the same line: bash would read the next line later, when this file may have changed.
keep_running "$NPROC" --standalone --local-addr=127.0.0.1 -m "$module" "$@"; exit
