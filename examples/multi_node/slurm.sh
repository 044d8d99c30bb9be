#!/usr/bin/env bash
# A Slurm job over two machines of eight GPUs; from the root of the repository:
#   sbatch examples/multi_node/slurm.sh --config configs/kdrl.yaml
# run.root must lie on a disk that all of them share.
#SBATCH --job-name=kdrl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
# Five minutes before the end, and when the job is preempted, every rank gets SIGTERM: the run saves the boundary before
# the rollout it is in and exits with status 143. Queued again, --resume auto goes on from there.
set -euo pipefail
# Since Slurm 22.05 srun does not take --cpus-per-task over from sbatch; without it every rank would have one core.
srun --cpus-per-task "${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 \
  python -m kdrl_pl fit "$@" --config "${STRATEGY:-configs/trainer/fsdp2.yaml}" \
  --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" --resume auto && status=0 || status=$?
if [ "$status" = 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
