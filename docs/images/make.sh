#!/usr/bin/env bash
# Makes the pictures of docs/images from a finished run of the quick start; from the root of the repository:
#   bash docs/images/make.sh runs/quickstart/2026-01-31_12-00-00
# It needs Chromium and the environment (. .venv/bin/activate).
set -euo pipefail
run=${1:?a run folder of the quick start}

kdrl report "$run"
picture() { python tests/browser/chromium.py "$run/report.html" "docs/images/report-$1.png" "${@:2}"; }
picture light 1280 1000 light
picture dark 1280 700 dark "#tokens"
picture phone-light 390 844 light
picture phone-dark 390 844 dark "#completions"
python docs/images/terminal.py "$run"
