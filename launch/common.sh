# Sourced by the launch scripts and by slurm/*.sbatch; running it does nothing.
# The caller gets the exit code of the run, and every stop signal reaches the run.
# shellcheck shell=bash

launch_dir=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
project_dir=$(dirname -- "$launch_dir")

# Open a closed standard stream as /dev/null, or the next opened file would get its number.
{ : <&0; } 2>/dev/null || exec </dev/null
{ : >&1; } 2>/dev/null || exec >/dev/null
{ : >&2; } 2>/dev/null || exec 2>/dev/null

# warn MESSAGE...: print it on stderr. The script continues even if that fails (full disk).
warn() {
  printf '%s: %s\n' "$(basename -- "$0")" "$*" >&2 || true
}

# die CODE MESSAGE...
die() {
  local code=$1
  shift
  warn "$@"
  exit "$code"
}

stopped_while_starting="stopped while it started; nothing is lost: start the same command again"

# check_number NAME VALUE MIN REMEDY
check_number() {
  [[ $2 =~ ^[0-9]{1,9}$ ]] && ((10#$2 >= $3)) && return
  die 64 "$1 (${2:-not set}) must be a whole number of at least $3; $4"
}

# Set `python`: $PYTHON, or the Python of setup.sh's .venv, or python3.
choose_python() {
  python=${PYTHON:-}
  if [[ -z $python && -x $project_dir/.venv/bin/python ]]; then
    python=$project_dir/.venv/bin/python
  fi
  python=${python:-python3}
  "$python" -c 'import importlib.util as u, sys
sys.exit(not (u.find_spec("torch") and u.find_spec("alexnet_ddp")))' 2>/dev/null || {
    [[ -z ${stopping:-} ]] || return 0 # Ctrl-C ended this Python; supervise will start nothing
    die 64 "Python ($python) must have torch and alexnet_ddp installed;" \
      "run launch/setup.sh, or set PYTHON"
  }
}

# Set `module`: alexnet_ddp.train, or alexnet_ddp.doctor if COMMAND=doctor.
choose_module() {
  [[ ${COMMAND:-train} =~ ^(train|doctor)$ ]] ||
    die 64 "COMMAND ($COMMAND) must be train or doctor; leave it unset to train"
  module=alexnet_ddp.${COMMAND:-train}
}

# num_gpus [overrides]: print the number of CUDA devices that a child process would see. It does not
# use torch, whose import takes seconds.
num_gpus() {
  local all=0 visible=() listed=0 id
  if [[ " $* " != *" device=cpu "* ]] && command -v nvidia-smi >/dev/null; then
    all=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
      IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
      for id in ${visible[@]+"${visible[@]}"}; do
        # Like CUDA, stop at the first unknown entry (-1). Slurm writes NoDevFiles for "none".
        [[ $id =~ ^([0-9]+|GPU-.+|MIG-.+)$ ]] || break
        listed=$((listed + 1))
      done
      ((listed >= all)) || all=$listed
    fi
  fi
  echo "$all"
}

# supervise COMMAND...: run it and return its exit code. TERM, INT, USR1 and HUP are forwarded to
# it. With forward_as=NAME every signal is forwarded as NAME. If a signal came since listen(), the
# command is not started, and the code is 75.
# - It runs in the background, because bash runs a trap only after a foreground child has ended.
# - `set -m` gives it its own process group, so that Ctrl-C reaches it once (from us) and not twice:
#   a second signal means "exit at once". It also keeps SIGINT enabled, which bash otherwise ignores
#   in background commands of a script.
# - stdin is /dev/null, because a background group that reads from the terminal is stopped.
supervise() {
  local code='' status
  listen
  [[ -z $stopping ]] || return 75
  set -m
  "$@" </dev/null &
  child=$!
  set +m
  [[ -z $signalled ]] || pass_on "$signalled" # it came before child=$!
  while :; do
    signalled='' status=0
    wait "$child" || status=$?
    # 127 in a second round: the child was reaped in the previous round, which returned its status.
    [[ $status == 127 && -n $code ]] || code=$status
    [[ -n $signalled ]] || break # a trap interrupted `wait`: the child is still running
  done
  trap 'stopping=1' TERM HUP INT USR1 # the rest is short: finish it, but remember the signal
  return "$code"
}

# listen: from now on no stop signal ends this script. Call it first.
listen() {
  child='' signalled='' stopping=${stopping:-}
  trap 'pass_on TERM' TERM HUP # save at HUP (a closed terminal) as at TERM
  trap 'pass_on INT' INT
  trap 'pass_on USR1' USR1
}

# pass_on SIGNAL: forward it to the child.
pass_on() {
  signalled=$1 stopping=1
  [[ -n $child ]] || return 0
  # This file marks a real stop: torchrun sends SIGTERM to the ranks if another rank has failed,
  # too.
  [[ -z ${ALEXNET_DDP_EXIT_CODE_FILE:-} ]] || : >"$ALEXNET_DDP_EXIT_CODE_FILE.stop" || true
  local name=${forward_as:-$1}
  # While Python starts, SIGINT makes it print a traceback; SIGTERM does not.
  if [[ $name == INT ]] && ! catches_term "$child"; then name=TERM; fi
  kill -s "$name" "$child" 2>/dev/null || true
}

# catches_term PID: true if the process has a handler for SIGTERM, or if there is no /proc.
catches_term() {
  local mask
  mask=$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$1/status" 2>/dev/null) || true
  [[ -z $mask ]] || ((16#$mask >> 14 & 1))
}

# processes_of_run: print the ids of processes with this run's exit code file in their environment;
# nothing without /proc.
processes_of_run() (
  file=$ALEXNET_DDP_EXIT_CODE_FILE
  unset ALEXNET_DDP_EXIT_CODE_FILE # so that grep and cut do not match themselves
  grep -lsF "$file" /proc/[0-9]*/environ | cut -d/ -f3 || true
)

# end_leftovers: stop workers that outlive torchrun, and give them time to save. torchrun may be
# killed, and its workers have sessions of their own.
end_leftovers() {
  local pids deadline=$((SECONDS + TORCH_ELASTIC_SHUTDOWN_TIMEOUT))
  pids=$(processes_of_run)
  # shellcheck disable=SC2086 # one word per process
  [[ -z $pids || -n $stopping ]] || kill -TERM $pids 2>/dev/null || true
  while [[ -n $pids ]] && ((SECONDS < deadline)); do
    sleep 0.2 || true
    pids=$(processes_of_run)
  done
  # shellcheck disable=SC2086
  [[ -z $pids ]] || kill -KILL $pids 2>/dev/null || true
}

# run_torchrun NUM_PROCESSES OPTIONS...: run torchrun and return the exit code of the run. torchrun
# returns 1 for every failure, so local rank 0 writes its code to ALEXNET_DDP_EXIT_CODE_FILE.
run_torchrun() {
  local nproc=$1 code=0 written
  shift
  : >"$ALEXNET_DDP_EXIT_CODE_FILE"
  # launch/torchrun.py handles the other signals itself.
  supervise "$python" "$launch_dir/torchrun.py" --nproc_per_node="$nproc" \
    --signals-to-handle=SIGQUIT "$@" || code=$?
  ((code == 0)) || end_leftovers

  written=$(<"$ALEXNET_DDP_EXIT_CODE_FILE")
  # If local rank 0 wrote 0 but another process failed, keep torchrun's code.
  if [[ $written =~ ^[0-9]{1,3}$ ]] && ((10#$written > 0)); then code=$((10#$written)); fi
  return "$code"
}

# make_files: set `files` to a new folder for a few bytes, in TMPDIR, in /tmp, or elsewhere if that
# disk is full.
make_files() {
  local parent
  for parent in "${TMPDIR:-/tmp}" /dev/shm "${XDG_RUNTIME_DIR:-/run}" "${HOME:-/}" "$PWD"; do
    files=$(mktemp -d "$parent/alexnet_ddp.XXXXXX" 2>/dev/null) || continue
    if printf '75\n' 2>/dev/null >"$files/trial"; then return; fi
    rm -rf "$files"
  done
  die 74 "no folder for temporary files: ${TMPDIR:-/tmp} cannot be written;" \
    "free some space there, or set TMPDIR"
}

# num_cores: print the number of cores that a child process may use, including cgroup CPU quotas.
num_cores() {
  "$python" -c 'from alexnet_ddp.runtime.environment import num_usable_cores
print(num_usable_cores())' 2>/dev/null || nproc
}

# leave CODE: remove the files and exit with the code; with 0 if wandb's sweep agent started this
# script (see local.sh) and the run was stopped and saved. The agent counts every other code as a
# failure, and ends after a few.
leave() {
  rm -rf "$files"
  [[ ! $1 =~ ^(75|79)$ || -z ${started_by_agent:-} ]] || exit 0
  exit "$1"
}

# keep_running NUM_PROCESSES OPTIONS...: run_torchrun, and restart it with the same arguments after
# a crash or a hang. Returns 93 after three restarts in a row without a newer checkpoint. Codes that
# the run itself chose (64, 75, ...; FINAL_CODES in runtime/errors.py) are returned without a restart.
keep_running() {
  local code step last='' restarts=0 delay
  choose_python

  # Gradients of 244 MB exceed glibc's mmap threshold, so each step would map, fault in and unmap
  # them again. Keep them in the heap (measured on 2 cores: 18.8 -> 24.7 images/s).
  export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-4294967296}
  export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-4294967296}
  # torchrun sets it, too, but prints a warning. alexnet_ddp sets torch's threads to cores /
  # processes.
  if (($1 > 1)); then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}; fi
  # Seconds from a stop signal to SIGKILL: enough to finish a step and save, and less than the time
  # that slurm/train.sbatch reserves. Versions of torch without this variable wait 30 s.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-150}

  make_files
  trap 'leave $?' EXIT
  export ALEXNET_DDP_EXIT_CODE_FILE=$files/exit_code ALEXNET_DDP_START_FILE=$files/start
  # A start at this step is the last one if it crashes; the run then alerts its user.
  export ALEXNET_DDP_GIVES_UP_AT=
  while :; do
    code=0
    : >"$ALEXNET_DDP_START_FILE"
    run_torchrun "$@" || code=$?
    # Stopped before the run could handle signals: the checkpoints have not changed.
    if [[ -n $stopping && $code =~ ^(1|75|1[0-9][0-9])$ ]]; then
      code=75
      # If the file is not empty, the run itself has printed a message.
      [[ -s $ALEXNET_DDP_EXIT_CODE_FILE ]] || warn "$stopped_while_starting"
    fi
    [[ ! $code =~ ^(0|64|65|66|70|74|75|79)$ && -z $stopping ]] || return "$code"
    step=$(<"$ALEXNET_DDP_START_FILE") delay=${RESTART_DELAY:-2}
    if [[ -z $step ]]; then            # this start did not reach a step
      [[ -n $last ]] || return "$code" # no start did: a restart would not help
      ((restarts < 3)) || return 76    # the other nodes are gone; a scheduler can requeue the job
      step=$last delay=$((delay * 5))  # the other nodes may still be ending
    fi
    [[ $step == "$last" ]] || restarts=0
    last=$step restarts=$((restarts + 1)) ALEXNET_DDP_GIVES_UP_AT=
    if ((restarts == 3)); then ALEXNET_DDP_GIVES_UP_AT=$step; fi
    if ((restarts > 3)); then
      warn "exit code $code, and no newer checkpoint after three restarts;" \
        "see failure.json in the run's folder"
      return 93
    fi
    warn "exit code $code; starting again from the newest checkpoint" \
      "(restart $restarts of 3; the last start began at step $step)"
    trap 'stopping=1' TERM HUP INT USR1
    sleep "$delay" || true
    if [[ -n $stopping ]]; then
      warn "stopped before the restart;" \
        "the same command continues from the newest checkpoint"
      return 75
    fi
  done
}

# requeue_if_stopped CODE CODES...: requeue the Slurm job if CODE is one of CODES and the job's
# state is RUNNING. In any other state Slurm has cancelled, preempted or timed out the job, and a
# requeue would undo an scancel.
requeue_if_stopped() {
  local name code=$1 state id
  name=${SLURM_JOB_NAME:-job}
  # In an array, name the task: the last task's SLURM_JOB_ID is that of the whole array, too.
  id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  id=${id:-$SLURM_JOB_ID}
  shift
  [[ " $* " == *" $code "* ]] || return 0
  state=$(scontrol show job "$id" | grep -o 'JobState=[A-Z_]*' || true)
  if [[ $state == JobState=RUNNING ]]; then
    echo "$name: exit code $code, requeueing job $id"
    scontrol requeue "$id" ||
      echo "$name: the job cannot be requeued; the same sbatch command resumes it" >&2
  else
    echo "$name: exit code $code, not requeueing: ${state:-JobState unknown}"
  fi
}
