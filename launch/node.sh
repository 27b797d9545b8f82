#!/usr/bin/env bash
# Starts one node of a run on several nodes. Call it on every node, with the same values:
#   launch/node.sh [overrides]
#   NNODES=2                     number of nodes, or MIN:MAX
#   RDZV_ENDPOINT=node1:29500    rendezvous: a host of the run and a free port there. The traffic is
#                                not authenticated and not encrypted, so use a private network
#   RDZV_ID=run42                a name that no other run uses
#   NODE_RANK=0                  optional; 0 on the rendezvous host; avoids relying on host-name
#                                resolution. Default under srun: SLURM_NODEID
#   NPROC_PER_NODE=8             optional; default: one process per visible CUDA device, or one
#   LAST_CALL_S=30               optional; with MIN:MAX: seconds that MIN nodes wait for more
#   COMMAND=doctor               optional; checks the machines instead of training
#   PYTHON                       default: .venv/bin/python, else python3
# If a node has several networks, export GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (eth0, ib0, ...).
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
listen

NNODES=${NNODES:-}
RDZV_ENDPOINT=${RDZV_ENDPOINT:-}
RDZV_ID=${RDZV_ID:-}
LAST_CALL_S=${LAST_CALL_S:-30}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}}
gpus=$(num_gpus "$@")
NPROC_PER_NODE=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}

check_nnodes() {
  if [[ $NNODES =~ ^([1-9][0-9]{0,5})(:([1-9][0-9]{0,5}))?$ ]]; then
    max_nodes=${BASH_REMATCH[3]:-$NNODES}
    ((BASH_REMATCH[1] <= max_nodes)) && return
  fi
  die 64 "NNODES (${NNODES:-not set}) must be a whole number of at least 1, or MIN:MAX;" \
    "for two machines: NNODES=2"
}

check_endpoint() {
  if [[ $RDZV_ENDPOINT =~ ^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})$ ]]; then
    ((10#${BASH_REMATCH[2]} >= 1 && 10#${BASH_REMATCH[2]} <= 65535)) && return
  fi
  die 64 "RDZV_ENDPOINT (${RDZV_ENDPOINT:-not set}) must be HOST:PORT" \
    "with a port from 1 to 65535; the same on every node, for example node1:29500"
}

choose_module
check_nnodes
check_endpoint
[[ $RDZV_ID =~ ^[A-Za-z0-9._-]+$ ]] ||
  die 64 "RDZV_ID (${RDZV_ID:-not set}) must be a name of letters, digits, '.', '_' and '-';" \
    "the same on every node, and used by no other run"
check_number LAST_CALL_S "$LAST_CALL_S" 0 "leave it unset for 30"
check_number NPROC_PER_NODE "$NPROC_PER_NODE" 1 "leave it unset for all devices of the node"

conf=last_call_timeout=$LAST_CALL_S
if [[ -n $NODE_RANK ]]; then
  check_number NODE_RANK "$NODE_RANK" 0 "0 on the host of RDZV_ENDPOINT, 1, 2, ... on the others"
  ((10#$NODE_RANK < max_nodes)) ||
    die 64 "NODE_RANK ($NODE_RANK) must be less than NNODES ($NNODES);" \
      "0 on the host of RDZV_ENDPOINT"
  conf+=,is_host=$((10#$NODE_RANK == 0))
fi

if [[ $NNODES == *:* ]]; then
  # With a shared store, torchrun (2.5 to 2.14) publishes its address only once, so a node that joins
  # later waits for it for 60 s, and both end.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
fi

# `exit` is on the same line: bash would read the next line later, when this file may have changed.
keep_running "$NPROC_PER_NODE" --nnodes="$NNODES" --rdzv-backend=c10d \
  --rdzv-endpoint="$RDZV_ENDPOINT" --rdzv-id="$RDZV_ID" --rdzv-conf="$conf" -m "$module" "$@"; exit
