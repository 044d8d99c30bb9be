#!/usr/bin/env bash
# Several machines without a scheduler. Start this on each of them, with the same arguments but NODE_RANK:
#   NODES=2 NODE_RANK=0 MASTER=first-machine bash examples/multi_node/torchrun.sh --config configs/kdrl.yaml
#   NODES=2 NODE_RANK=1 MASTER=first-machine bash examples/multi_node/torchrun.sh --config configs/kdrl.yaml
# run.root must lie on a disk that all of them share. --resume auto goes on from the newest checkpoint, if there is one.
set -euo pipefail
: "${NODES:?how many machines}" "${NODE_RANK:?number of this one, from 0}" "${MASTER:?name of machine 0}"
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
# A rank that failed ends the whole job (kdrl_pl/rank_watch.py), so torchrun must not start it again.
exec torchrun --nnodes "$NODES" --node-rank "$NODE_RANK" --nproc-per-node "$GPUS" --max-restarts 0 \
  --master-addr "$MASTER" --master-port "${PORT:-29500}" \
  -m kdrl_pl fit "$@" --config "${STRATEGY:-configs/trainer/fsdp2.yaml}" \
  --trainer.num_nodes "$NODES" --trainer.devices "$GPUS" --resume auto
