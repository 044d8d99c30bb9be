#!/usr/bin/env bash
# Makes the models of the testbeds again, all or those named, for example arithmetic-student (a minute or two each).
# Seeds are fixed; so is the number of threads, which changes the last bits of sums.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
export OMP_NUM_THREADS=1
if [ $# -eq 0 ]; then set -- $(cd configs/testbeds/sft && ls | sed 's/\.yaml$//'); fi
for name in "$@"; do
  config=configs/testbeds/sft/$name.yaml
  blank=$(sed -n 's/^  student: //p' "$config")  # runs/testbeds/blank-TASK-HIDDEN
  IFS=- read -r _ task hidden <<< "$blank"
  folder=checkpoints/testbeds/${name%%-*}/${name#*-}
  rm -rf "runs/testbeds/$name" "$folder"
  $python -m kdrl_pl.models.tiny "$blank" --task "$task" --hidden "$hidden" --layers 2 --intermediate $((hidden + 64))
  $python -m kdrl_pl sft --config configs/testbeds/sft.yaml --config "$config" --run.root runs/testbeds
  $python -m kdrl_pl export "runs/testbeds/$name"/* --last --output "$folder"
done
