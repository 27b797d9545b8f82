#!/usr/bin/env bash
# Hosts on this machine, for tests and benchmarks: n1, n2, ..., joined by a switch, each with its own network, host
# name, processes and /dev/shm, and an equal share of the cores. Started by tests/cluster/__init__.py:
#   unshare --net --uts --mount --pid --ipc --fork --kill-child --mount-proc hosts.sh NUM_HOSTS [slurm]
# Its one rule: everything lives in the namespaces of this process, the first of its PID namespace. When stdin is closed,
# or this process dies in whatever way, the kernel ends all processes, links and mounts with it.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
num_hosts=$1
cores=$(nproc)

# Nothing is written to the machine's own /run, /etc or /dev/shm.
mount -t tmpfs tmpfs /run
mkdir /run/hosts /run/log

# This one is the switch, and the host "ctl": the network 10.77.0.0/24 exists only here, and leads nowhere else.
hostname ctl
{
  echo '127.0.0.1 localhost'
  echo '10.77.0.1 ctl'
  for ((i = 1; i <= num_hosts; i++)); do echo "10.77.0.$((10 + i)) n$i"; done
} >/run/etc_hosts
mount --bind /run/etc_hosts /etc/hosts
ip link set lo up
ip link add switch type bridge forward_delay 0 mcast_snooping 0
ip addr add 10.77.0.1/24 dev switch
ip link set switch up

for ((i = 1; i <= num_hosts; i++)); do
  first=$(((i - 1) * cores / num_hosts)) last=$((i * cores / num_hosts - 1))
  # The first process of a host only waits, and takes in orphans. Disks are common to all hosts, /run too.
  # shellcheck disable=SC2016 # $1 is the host's
  unshare --net --uts --mount --pid --ipc --fork --kill-child --mount-proc bash -c '
    hostname "$1"; mount -t tmpfs -o mode=1777 tmpfs /dev/shm
      while :; do sleep infinity & wait; done' host "n$i" </dev/null 2>"/run/log/n$i" & # it complains when the host is crashed
  pid=$(until pgrep -P $!; do sleep 0.01; done)
  echo "$pid $first-$((last < first ? first : last))" >"/run/hosts/n$i"
  ip link add "n$i" type veth peer name eth0 netns "$pid"
  ip link set "n$i" master switch up
  until [[ $("$here/on.sh" "n$i" hostname) == "n$i" ]]; do sleep 0.01; done
  "$here/on.sh" "n$i" ip link set lo up
  "$here/on.sh" "n$i" ip addr add "10.77.0.$((10 + i))/24" dev eth0
  "$here/on.sh" "n$i" ip link set eth0 up
done

if [[ ${2:-} == slurm ]]; then "$here/slurm.sh" "$num_hosts"; fi

echo up
read -r _ || true # until whoever started this closes stdin, or is gone
