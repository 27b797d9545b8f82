#!/usr/bin/env bash
# Runs a command on a host of hosts.sh; for use within its namespaces:   on.sh ctl|n1|n2|... COMMAND...
set -euo pipefail
host=$1
shift
[[ $host != ctl ]] || exec "$@"
read -r pid cores <"/run/hosts/$host"
exec nsenter --target "$pid" --all --wd=. -- taskset -c "$cores" "$@"
