#!/usr/bin/env bash
# A Spark cluster on this machine, until ctrl-C:       launch/spark.sh
# Or for as long as a preparation takes:               launch/spark.sh source=DIR root=DIR [overrides]
#   WORKERS=2      worker processes
#   CORES=         cores a worker; default: those of this machine, shared out
#   MEMORY=1g      for the executor of a worker; its Python processes come on top
#   HOST=127.0.0.1 where master and workers listen. Whoever reaches it can run code as you: set SPARK_SECRET elsewhere
#   PORT=7077      the master's
#   UI_PORT=       of its web page; default: a free one, which the master's log names
#   MASTER=        spark://HOST:PORT: workers only, for a master that is there
#   SPARK_SECRET=  the cluster accepts only who has it; a driver needs the SPARK_CONF_DIR that is printed
#   PYTHON         default: .venv/bin/python, else python3
# Exit code: the preparation's.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

WORKERS=${WORKERS:-2} MEMORY=${MEMORY:-1g} HOST=${HOST:-127.0.0.1} PORT=${PORT:-7077} MASTER=${MASTER:-}
check_number WORKERS "$WORKERS" 1 "leave it unset for 2"
check_number PORT "$PORT" 1 "leave it unset for 7077"
choose_python
cores=$(num_cores)
CORES=${CORES:-$((cores / WORKERS > 0 ? cores / WORKERS : 1))}
check_number CORES "$CORES" 1 "leave it unset to share this machine's out"
[[ $MEMORY =~ ^[1-9][0-9]*[mg]$ ]] || die 64 "MEMORY ($MEMORY) must be a number with m or g; for example MEMORY=2g"

# Prints where Spark and Java are, or one line that says what is missing.
places=$("$python" -c '
import sys
try:
    import pyspark
    from alexnet_ddp.prepare.java import find_java
    print(pyspark.__path__[0], find_java(None), sep="\n")
except ImportError:
    sys.exit("spark.sh: pyspark is not installed; pip install \"alexnet-ddp[spark]\"")
except ValueError as error:
    sys.exit(f"spark.sh: {error}")') || exit 64
export SPARK_HOME=${SPARK_HOME:-${places%%$'\n'*}} JAVA_HOME=${places##*$'\n'}

folder=$(mktemp -d "${TMPDIR:-/tmp}/alexnet_ddp.cluster.XXXXXX") # nobody else can look into it
pids=()
stop_cluster() {
  trap '' INT TERM HUP USR1
  [[ -z ${pids[*]} ]] || kill "${pids[@]}" 2>/dev/null || true # a worker ends its executors
  wait
  rm -rf "$folder"
}
trap stop_cluster EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
trap 'exit 0' USR1 # slurm/prepare.sbatch is done

if [[ -n ${SPARK_SECRET:-} ]]; then # in a file, because every user can read command lines
  export SPARK_CONF_DIR=$folder
  printf 'spark.authenticate true\nspark.authenticate.secret %s\n' "$SPARK_SECRET" >"$folder/spark-defaults.conf"
fi

# start NAME IP CLASS ARGUMENTS...: a daemon, in a process group of its own, so that ctrl-C reaches the driver first.
start() {
  local name=$1 ip=$2
  shift 2
  set -m
  SPARK_LOCAL_IP=$ip SPARK_DAEMON_JAVA_OPTS="-XX:TieredStopAtLevel=1 ${SPARK_DAEMON_JAVA_OPTS:-}" \
    "$SPARK_HOME/bin/spark-class" "org.apache.spark.deploy.$@" >"$folder/$name.log" 2>&1 </dev/null &
  pids+=($!)
  set +m
}

# await NAME TEXT: until the daemon's log has it.
await() {
  local deadline=$((SECONDS + 90))
  until grep -qs "$2" "$folder/$1.log"; do
    if ! kill -0 "${pids[-1]}" 2>/dev/null || ((SECONDS > deadline)); then
      die 1 "Spark's $1 did not start: $(grep -E 'Exception|ERROR|WARN' "$folder/$1.log" | tail -n 1)"
    fi
    sleep 0.2
  done
}

if [[ -z $MASTER ]]; then
  MASTER=spark://$HOST:$PORT
  # A port that is taken is an error: the next one is not where the workers look.
  SPARK_DAEMON_JAVA_OPTS=-Dspark.port.maxRetries=0 \
    start master "$HOST" master.Master --host "$HOST" --port "$PORT" --webui-port "${UI_PORT:-0}"
  await master 'New state: ALIVE'
fi
for ((i = 1; i <= WORKERS; i++)); do
  # Spark never starts a second attempt of a slow task on the address of the first: workers here get one each.
  ip=$HOST
  if [[ $HOST == 127.0.0.1 ]]; then ip=127.0.0.$i; fi
  start "worker$i" "$ip" worker.Worker --host "$ip" --webui-port 0 --cores "$CORES" --memory "$MEMORY" \
    --work-dir "$folder/worker$i" "$MASTER"
done
for ((i = 1; i <= WORKERS; i++)); do await "worker$i" 'Successfully registered with master'; done

driver=(engine=spark "engine.master=$MASTER" "+engine.conf.spark.executor.memory=$MEMORY")
if (($# > 0)); then
  code=0
  supervise "$python" -m alexnet_ddp.prepare "${driver[@]}" "$@" || code=$?
  exit "$code"
fi
echo "spark.sh: $MASTER, $WORKERS workers with $CORES cores each; logs in $folder; ctrl-C stops it"
[[ -n ${SLURM_JOB_ID:-} ]] || echo "  ${SPARK_SECRET:+SPARK_CONF_DIR=$folder }python -m alexnet_ddp.prepare source=... root=... ${driver[*]}"
while kill -0 "${pids[@]}" 2>/dev/null; do # true while one of them lives
  sleep 1 &
  wait $! # unlike a sleep in the foreground, a trap ends it
done
die 1 "all processes of the cluster have ended"
