#!/usr/bin/env bash
# Runs a Spark cluster on this machine.
#   launch/spark.sh                                    until Ctrl-C
#   launch/spark.sh source=DIR root=DIR [overrides]    for one `python -m alexnet_ddp.prepare`
#   WORKERS=2      number of worker processes
#   CORES=         cores per worker; default: an equal share of this machine's
#   MEMORY=1g      memory of a worker's executor; its Python processes need more
#   HOST=127.0.0.1 address of master and workers. A client that reaches it can run code as your
#                  user, so set SPARK_SECRET if you change it
#   PORT=7077      port of the master
#   UI_PORT=       port of the master's web page; default: a free one, see the master's log
#   MASTER=        spark://HOST:PORT of a running master: start workers only
#   SPARK_SECRET=  clients need this secret; a driver needs the SPARK_CONF_DIR that is printed
#   PYTHON         default: .venv/bin/python, else python3
# Exit code: that of the preparation.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

WORKERS=${WORKERS:-2}
MEMORY=${MEMORY:-1g}
HOST=${HOST:-127.0.0.1}
PORT=${PORT:-7077}
MASTER=${MASTER:-}
check_number WORKERS "$WORKERS" 1 "leave it unset for 2"
check_number PORT "$PORT" 1 "leave it unset for 7077"
choose_python
cores=$(num_cores)
CORES=${CORES:-$((cores / WORKERS > 0 ? cores / WORKERS : 1))}
check_number CORES "$CORES" 1 "leave it unset for an equal share of this machine's"
[[ $MEMORY =~ ^[1-9][0-9]*[mg]$ ]] ||
  die 64 "MEMORY ($MEMORY) must be a number with m or g; for example MEMORY=2g"

# The folders of Spark and Java; or exit with one line about what is missing.
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

folder=$(mktemp -d "${TMPDIR:-/tmp}/alexnet_ddp.cluster.XXXXXX") # readable by this user only
pids=()
stop_cluster() {
  trap '' INT TERM HUP USR1
  [[ -z ${pids[*]} ]] || kill "${pids[@]}" 2>/dev/null || true # a worker stops its executors
  wait
  rm -rf "$folder"
}
trap stop_cluster EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
trap 'exit 0' USR1 # from slurm/prepare.sbatch, at its end

if [[ -n ${SPARK_SECRET:-} ]]; then # in a file, because every user can read command lines
  export SPARK_CONF_DIR=$folder
  printf 'spark.authenticate true\nspark.authenticate.secret %s\n' "$SPARK_SECRET" \
    >"$folder/spark-defaults.conf"
fi

# start NAME IP CLASS ARGUMENTS...: start a daemon in its own process group, so that Ctrl-C reaches
# the driver first.
start() {
  local name=$1 ip=$2
  shift 2
  set -m
  SPARK_LOCAL_IP=$ip SPARK_DAEMON_JAVA_OPTS="-XX:TieredStopAtLevel=1 ${SPARK_DAEMON_JAVA_OPTS:-}" \
    "$SPARK_HOME/bin/spark-class" "org.apache.spark.deploy.$@" \
    >"$folder/$name.log" 2>&1 </dev/null &
  pids+=($!)
  set +m
}

# await NAME TEXT: wait until the daemon's log contains TEXT.
await() {
  local deadline=$((SECONDS + 90))
  until grep -qs "$2" "$folder/$1.log"; do
    if ! kill -0 "${pids[-1]}" 2>/dev/null || ((SECONDS > deadline)); then
      die 1 "Spark's $1 did not start:" \
        "$(grep -E 'Exception|ERROR|WARN' "$folder/$1.log" | tail -n 1)"
    fi
    sleep 0.2
  done
}

if [[ -z $MASTER ]]; then
  MASTER=spark://$HOST:$PORT
  # If the port is in use, fail: the workers would not find the master on the next one.
  SPARK_DAEMON_JAVA_OPTS=-Dspark.port.maxRetries=0 \
    start master "$HOST" master.Master --host "$HOST" --port "$PORT" --webui-port "${UI_PORT:-0}"
  await master 'New state: ALIVE'
fi
for ((i = 1; i <= WORKERS; i++)); do
  # Give each worker its own address: Spark does not start a second attempt of a slow task on the
  # address of the first.
  ip=$HOST
  if [[ $HOST == 127.0.0.1 ]]; then ip=127.0.0.$i; fi
  start "worker$i" "$ip" worker.Worker --host "$ip" --webui-port 0 --cores "$CORES" \
    --memory "$MEMORY" --work-dir "$folder/worker$i" "$MASTER"
done
for ((i = 1; i <= WORKERS; i++)); do
  await "worker$i" 'Successfully registered with master'
done

driver=(engine=spark "engine.master=$MASTER" "+engine.conf.spark.executor.memory=$MEMORY")
if (($# > 0)); then
  code=0
  supervise "$python" -m alexnet_ddp.prepare "${driver[@]}" "$@" || code=$?
  exit "$code"
fi
echo "spark.sh: $MASTER, $WORKERS workers with $CORES cores each; logs in $folder; Ctrl-C stops it"
if [[ -z ${SLURM_JOB_ID:-} ]]; then
  prepare="python -m alexnet_ddp.prepare source=... root=... ${driver[*]}"
  echo "  ${SPARK_SECRET:+SPARK_CONF_DIR=$folder }$prepare"
fi
while kill -0 "${pids[@]}" 2>/dev/null; do # true while one of them is running
  sleep 1 &
  wait $! # a trap interrupts `wait`, but not a sleep in the foreground
done
die 1 "all processes of the cluster have ended"
