#!/usr/bin/env bash
# Makes docs/images/report-*.png from a run of the quick start: bash docs/images/make.sh
# It needs Chromium and the environment (. .venv/bin/activate), and takes a few minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

kdrl fit --config configs/quickstart.yaml --run.root "$folder" > "$folder/log" 2>&1
page=$(ls -d "$folder"/quickstart/*/report.html)

picture() { python tests/browser/chromium.py "$page" "docs/images/report-$1.png" "${@:2}"; }
picture light 1280 1000 light
picture dark 1280 700 dark "#tokens"
picture phone-light 390 844 light
picture phone-dark 390 844 dark "#completions"
