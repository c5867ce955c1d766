#!/usr/bin/env bash
# For whoever has a GPU for a few minutes: bash results/gpu.sh [SECONDS]
# Runs the tests marked gpu (at most 60 s), then makes the tables of results/speed/gpu.py, the most
# important first, within so many seconds (default 300). All goes to runs/gpu, or to the folder that
# OUT names, as it is made. PY names the Python, which needs neither medpy nor SimpleITK. Without a
# GPU all is tiny.
set -eu
cd "$(dirname "$0")/.."
seconds=${1:-300}
timeout $((seconds + 30)) "${PY:-.venv/bin/python}" -m results.speed.gpu --out "${OUT:-runs/gpu}" \
  --seconds "$seconds"
