#!/usr/bin/env bash
# Makes the models of the testbeds again, all or those named, e.g. arithmetic-student. Seeds are fixed; one thread, since
# how sums are split over threads changes the last bits.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
export OMP_NUM_THREADS=1
if [ $# -eq 0 ]; then set -- $(cd configs/testbeds/sft && ls | sed 's/\.yaml$//'); fi
blank() { $python -m kdrl_pl.models.tiny "runs/testbeds/blank-$1-$2" --task "$1" --hidden "$2" --layers 2 --intermediate "$3"; }
for task in addition knights; do
  blank $task 64 128
  blank $task 128 192
done
for name in "$@"; do
  folder=checkpoints/testbeds/${name%%-*}/${name#*-}
  rm -rf "runs/testbeds/$name" "$folder"
  $python -m kdrl_pl sft --config configs/testbeds/sft.yaml --config "configs/testbeds/sft/$name.yaml" --run.root runs/testbeds
  $python -m kdrl_pl export "runs/testbeds/$name"/* --last --output "$folder"
done
