#!/usr/bin/env bash
# One node of several. Start it on every node, with the same MASTER_ADDR (a host that all reach) and the node's own NODE_RANK:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node-0 docs/launch/torchrun.sh configs/mine.toml --folder /shared/runs/mine --continue
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${NNODES:=1}" "${NODE_RANK:=0}" "${MASTER_ADDR:=127.0.0.1}" "${MASTER_PORT:=29500}"
: "${NPROC_PER_NODE:=$(command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi --list-gpus | wc -l || echo 1)}"
: "${TORCHRUN:=$([ -x .venv/bin/torchrun ] && echo .venv/bin/torchrun || echo torchrun)}"
exec "$TORCHRUN" --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "$NPROC_PER_NODE" --max-restarts "${MAX_RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "${RUN_ID:-$MASTER_ADDR:$MASTER_PORT}" engine/train.py "$@"
