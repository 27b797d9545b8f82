# Sourced by the launch scripts and by slurm/*.sbatch; running it does nothing.
# Its one rule: whoever starts a run through here gets the run's own exit code, and every stop signal reaches the run.
# shellcheck shell=bash

project_dir=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

# A closed standard stream becomes /dev/null: the next file that is opened would get its number.
{ : <&0; } 2>/dev/null || exec </dev/null
{ : >&1; } 2>/dev/null || exec >/dev/null
{ : >&2; } 2>/dev/null || exec 2>/dev/null

warn() { # warn MESSAGE: on stderr; a full disk there does not end the script
  printf '%s: %s\n' "$(basename -- "$0")" "$1" >&2 || true
}

die() { # die CODE MESSAGE
  warn "$2"
  exit "$1"
}

stopped_while_starting="stopped while it started; nothing is lost: start the same command again"

# check_number NAME VALUE MIN REMEDY
check_number() {
  [[ $2 =~ ^[0-9]{1,9}$ ]] && ((10#$2 >= $3)) && return
  die 64 "$1 (${2:-not set}) must be a whole number of at least $3; $4"
}

# The Python that runs the project: $PYTHON, else the one setup.sh made, else python3.
choose_python() {
  python=${PYTHON:-}
  if [[ -z $python && -x $project_dir/.venv/bin/python ]]; then python=$project_dir/.venv/bin/python; fi
  python=${python:-python3}
  "$python" -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("torch") and u.find_spec("alexnet_ddp")))' \
    2>/dev/null || {
    [[ -z ${stopping:-} ]] || return 0 # Ctrl-C ended this Python; supervise will start nothing
    die 64 "Python ($python) must have torch and alexnet_ddp installed; run launch/setup.sh, or set PYTHON"
  }
}

# What to run on the processes: a training, or with COMMAND=doctor an examination of where it would be.
choose_module() {
  [[ ${COMMAND:-train} =~ ^(train|doctor)$ ]] || die 64 "COMMAND ($COMMAND) must be train or doctor; leave it unset to train"
  module=alexnet_ddp.${COMMAND:-train}
}

# num_gpus [overrides]: the CUDA devices that a process started from here would see. Asks no torch: that takes seconds.
num_gpus() {
  local all=0 visible=() listed=0 id
  if [[ " $* " != *" device=cpu "* ]] && command -v nvidia-smi >/dev/null; then
    all=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
      IFS=, read -ra visible <<<"$CUDA_VISIBLE_DEVICES"
      for id in ${visible[@]+"${visible[@]}"}; do
        # CUDA stops at the first entry it does not know (-1), and so does this; Slurm writes NoDevFiles for "none".
        [[ $id =~ ^([0-9]+|GPU-.+|MIG-.+)$ ]] || break
        listed=$((listed + 1))
      done
      ((listed >= all)) || all=$listed
    fi
  fi
  echo "$all"
}

# supervise COMMAND...: runs it and returns its exit code; TERM, INT, USR1 and HUP are passed on to it.
# In the background, because bash runs a trap only after a foreground child has ended. `set -m`, because it
#  - puts the command into a process group of its own, so that Ctrl-C reaches it once, through us, and not twice
#    (a second signal means "exit at once"), and
#  - leaves SIGINT as it is: a background command of a script otherwise starts with SIGINT ignored.
# stdin is closed: a background group that reads from the terminal would be stopped, and nothing here asks questions.
# forward_as=NAME passes every signal on as NAME.
# A signal that came since listen() and before this is not passed on to a child that cannot listen yet: 75.
supervise() {
  local code='' status
  listen
  [[ -z $stopping ]] || return 75
  set -m
  "$@" </dev/null &
  child=$!
  set +m
  [[ -z $signalled ]] || pass_on "$signalled" # it came while the child was started
  while :; do
    signalled='' status=0
    wait "$child" || status=$?
    # 127 in a second round: the child was reaped in the round before, whose status stands.
    [[ $status == 127 && -n $code ]] || code=$status
    [[ -n $signalled ]] || break # else: wait was cut short by a trap, the child still runs
  done
  trap 'stopping=1' TERM HUP INT USR1 # what is left is short, and must not be cut; but it is not forgotten
  return "$code"
}

# listen: from here on no stop signal ends this script. The first thing to do.
listen() {
  child='' signalled='' stopping=${stopping:-}
  trap 'pass_on TERM' TERM HUP # the terminal is gone: a run that survives that should be saved as for TERM
  trap 'pass_on INT' INT
  trap 'pass_on USR1' USR1
}

pass_on() { # pass_on SIGNAL
  signalled=$1 stopping=1
  [[ -n $child ]] || return 0
  # The run looks for this file: torchrun sends SIGTERM also if another rank has failed.
  [[ -z ${ALEXNET_DDP_EXIT_CODE_FILE:-} ]] || : >"$ALEXNET_DDP_EXIT_CODE_FILE.stop" || true
  local name=${forward_as:-$1}
  # SIGINT makes Python print a trace while Python itself starts. SIGTERM then ends it without one.
  if [[ $name == INT ]] && ! catches_term "$child"; then name=TERM; fi
  kill -s "$name" "$child" 2>/dev/null || true
}

catches_term() { # catches_term PID: true also if there is no /proc
  local mask
  mask=$(sed -n 's/^SigCgt:[[:space:]]*//p' "/proc/$1/status" 2>/dev/null) || true
  [[ -z $mask ]] || ((16#$mask >> 14 & 1))
}

# processes_of_run: ids of what was started with this run's exit code file in its environment (nothing without /proc).
processes_of_run() (
  file=$ALEXNET_DDP_EXIT_CODE_FILE
  unset ALEXNET_DDP_EXIT_CODE_FILE # else grep and cut find themselves
  grep -lsF "$file" /proc/[0-9]*/environ | cut -d/ -f3 || true
)

# end_leftovers: torchrun may die before its workers: killed, or by a third signal, and under Slurm each signal reaches
# it twice (from Slurm, and from here). The workers, in sessions of their own, then get their time to save all the same.
end_leftovers() {
  local pids deadline=$((SECONDS + TORCH_ELASTIC_SHUTDOWN_TIMEOUT))
  pids=$(processes_of_run)
  # shellcheck disable=SC2086 # one word a process
  [[ -z $pids || -n $stopping ]] || kill -TERM $pids 2>/dev/null || true
  while [[ -n $pids ]] && ((SECONDS < deadline)); do
    sleep 0.2 || true
    pids=$(processes_of_run)
  done
  # shellcheck disable=SC2086
  [[ -z $pids ]] || kill -KILL $pids 2>/dev/null || true
}

# run_torchrun NUM_PROCESSES OPTIONS...: torchrun, with the exit code of the run instead of torchrun's 1.
# torchrun answers 1 whatever a worker's code was, so local rank 0 writes its own into ALEXNET_DDP_EXIT_CODE_FILE.
run_torchrun() {
  local nproc=$1 code=0 written
  shift
  : >"$ALEXNET_DDP_EXIT_CODE_FILE"
  # By default torchrun neither handles SIGUSR1 nor survives it. launch/torchrun.py makes SIGTERM of SIGINT.
  supervise "$python" "$project_dir/launch/torchrun.py" --nproc_per_node="$nproc" \
    --signals-to-handle=SIGTERM,SIGHUP,SIGQUIT,SIGUSR1 "$@" || code=$?
  ((code == 0)) || end_leftovers

  written=$(<"$ALEXNET_DDP_EXIT_CODE_FILE")
  # A 0 of local rank 0 does not hide that another process failed.
  if [[ $written =~ ^[0-9]{1,3}$ ]] && ((10#$written > 0)); then code=$((10#$written)); fi
  return "$code"
}

# make_files: $files, a folder for a few bytes: in TMPDIR or /tmp, and somewhere else if the disk is full there.
make_files() {
  local place
  for place in "${TMPDIR:-/tmp}" /dev/shm "${XDG_RUNTIME_DIR:-/run}" "${HOME:-/}" "$PWD"; do
    files=$(mktemp -d "$place/alexnet_ddp.XXXXXX" 2>/dev/null) || continue
    if printf '75\n' 2>/dev/null >"$files/trial"; then return; fi
    rm -rf "$files"
  done
  die 74 "no folder for temporary files: ${TMPDIR:-/tmp} cannot be written; free some space there, or set TMPDIR"
}

# num_cores: cores that a process started from here may use, with the CPU quotas of its control groups.
num_cores() {
  "$python" -c 'from alexnet_ddp.runtime.environment import num_usable_cores; print(num_usable_cores())' 2>/dev/null || nproc
}

# keep_running NUM_PROCESSES OPTIONS...: run_torchrun, and again after a crash or a hang, with the same arguments, until
# three restarts in a row have found no newer checkpoint: 93. What a run has said itself (64, 75, ...) stands.
keep_running() {
  local code step last='' restarts=0 delay
  choose_python

  # Gradients of 244 MB are above glibc's mmap threshold: each step would map them anew, page-fault them in, and hand
  # them back. Kept in the heap they cost nothing (measured on 2 cores: 18.8 -> 24.7 images/s).
  export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-4294967296} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-4294967296}
  # What torchrun would set anyway, without its warning. alexnet_ddp sets torch's own threads to cores / processes.
  if (($1 > 1)); then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}; fi
  # Seconds between a stop signal and SIGKILL: enough to finish a step and to save, and less than slurm/train.sbatch
  # leaves. A torch that does not know this variable waits 30 s.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-150}

  make_files
  trap 'rm -rf "$files"' EXIT
  export ALEXNET_DDP_EXIT_CODE_FILE=$files/exit_code ALEXNET_DDP_START_FILE=$files/start
  while :; do
    code=0
    : >"$ALEXNET_DDP_START_FILE"
    run_torchrun "$@" || code=$?
    # Stopped before it could listen: the checkpoints are as they were.
    if [[ -n $stopping && $code =~ ^(1|75|1[0-9][0-9])$ ]]; then
      code=75
      [[ -s $ALEXNET_DDP_EXIT_CODE_FILE ]] || warn "$stopped_while_starting" # otherwise the run has explained it
    fi
    [[ ! $code =~ ^(0|64|65|66|70|74|75)$ && -z $stopping ]] || return "$code"
    step=$(<"$ALEXNET_DDP_START_FILE") delay=${RESTART_DELAY:-2}
    if [[ -z $step ]]; then                # it did not come as far as a step,
      [[ -n $last ]] || return "$code"     # and none before did: another start would not help
      ((restarts < 3)) || return 76        # the others of this run are gone, and a scheduler may know better
      step=$last delay=$((delay * 5))      # the others may still be ending
    fi
    [[ $step == "$last" ]] || restarts=0
    last=$step restarts=$((restarts + 1))
    if ((restarts > 3)); then
      warn "exit code $code, and no newer checkpoint after three restarts; failure.json in the run's folder says where"
      return 93
    fi
    warn "exit code $code; starting again (restart $restarts of 3 from the checkpoint of step $step)"
    trap 'stopping=1' TERM HUP INT USR1
    sleep "$delay" || true
    if [[ -n $stopping ]]; then
      warn "stopped before the restart; the same command continues from the checkpoint of step $step"
      return 75
    fi
  done
}

# requeue_if_stopped CODE CODES...: under Slurm, where CODE is one of CODES. A job that is not RUNNING any more was
# cancelled, preempted or timed out: there Slurm has decided already, and a requeue would undo an scancel.
requeue_if_stopped() {
  local name code=$1 state id
  name=${SLURM_JOB_NAME:-job}
  # One task of an array: the last one's SLURM_JOB_ID is the array's as well, and would requeue all of them.
  id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  id=${id:-$SLURM_JOB_ID}
  shift
  [[ " $* " == *" $code "* ]] || return 0
  state=$(scontrol show job "$id" | grep -o 'JobState=[A-Z_]*' || true)
  if [[ $state == JobState=RUNNING ]]; then
    echo "$name: exit code $code, requeueing job $id"
    scontrol requeue "$id" || echo "$name: no requeue here; the same sbatch command goes on where it was" >&2
  else
    echo "$name: exit code $code, not requeueing: ${state:-JobState unknown}"
  fi
}
