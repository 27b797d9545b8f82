#!/usr/bin/env bash
# A real Slurm on the hosts of hosts.sh, which calls this: slurmctld on "ctl", a slurmd on each of n1, n2, ..., munge.
# No accounting, no cgroups, GPUs without devices: nodes claim 8 GPUs, 64 CPUs and 256 GB, whatever the machine has.
# Written for, and tried with, Debian's Slurm 22.05.
#   slurm.sh NUM_HOSTS    configuration and logs in /run/slurm and /run/log of the namespace
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
num_hosts=$1
PATH=$PATH:/usr/sbin
etc=/run/slurm
mkdir -p $etc/{munge,gpus,state}

# One munged serves all hosts: a socket is reached from every network namespace.
head -c 128 /dev/urandom >$etc/munge/key
chmod 600 $etc/munge/key
chown -R munge:munge $etc/munge
chmod 711 $etc/munge
setpriv --reuid munge --regid munge --clear-groups munged --key-file=$etc/munge/key --socket=$etc/munge/socket \
  --pid-file=$etc/munge/pid --log-file=$etc/munge/log --seed-file=$etc/munge/seed

# Stand-ins for /dev/nvidia0..7: with files, and not only a count, jobs get CUDA_VISIBLE_DEVICES as on a real node.
for i in {0..7}; do mknod -m 666 "$etc/gpus/nvidia$i" c 1 3; done
printf 'AutoDetect=off\nNodeName=n[1-%s] Name=gpu File=%s/gpus/nvidia[0-7]\n' "$num_hosts" $etc >$etc/gres.conf
# slurmd 22.05 loads a cgroup plugin whatever the configuration; this one does not look for /sys/fs/cgroup.
echo 'CgroupPlugin=cgroup/v1' >$etc/cgroup.conf

# cred_expire: a requeued job waits so long; 120 s by default. KillWait: between SIGTERM and SIGKILL, Slurm's default.
cat >$etc/slurm.conf <<CONF
ClusterName=test
SlurmctldHost=ctl(10.77.0.1)
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$etc/munge/socket,cred_expire=5
StateSaveLocation=$etc/state
SlurmdSpoolDir=$etc/spool.%n
SlurmctldPidFile=$etc/slurmctld.pid
SlurmdPidFile=$etc/slurmd.%n.pid
SlurmctldLogFile=/run/log/slurmctld
SlurmdLogFile=/run/log/slurmd.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
GresTypes=gpu
ReturnToService=1
KillWait=30
MinJobAge=3600
SlurmdTimeout=20
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-$num_hosts] NodeAddr=10.77.0.[11-$((10 + num_hosts))] CPUs=64 Boards=1 SocketsPerBoard=1 CoresPerSocket=64 ThreadsPerCore=1 RealMemory=256000 Gres=gpu:8 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
CONF

export SLURM_CONF=$etc/slurm.conf
slurmctld -c
for ((i = 1; i <= num_hosts; i++)); do
  mkdir $etc/spool.n$i
  "$here/on.sh" "n$i" slurmd -N "n$i"
done
until [[ $(sinfo -h -N -p main -t idle -o %N | wc -l) == "$num_hosts" ]]; do sleep 0.1; done
