#!/usr/bin/env bash
# R1-Zero in Colab, on its TPU or its CPU: in a cell, !bash launch/colab.sh [--dry-run] [--config.KEY=VALUE ...]
#
# With a TPU runtime the extra [tpu] brings jax's TPU support. WORKDIR on a mounted Drive survives the machine: the same
# cell goes on there. notebooks/zero_colab.ipynb does the same step by step and draws the curves.
set -euo pipefail
cd "$(dirname "$0")/.."

step() { if [[ -n $dry ]]; then printf '%q ' "$@" && echo; else "$@"; fi; }
dry=''
[[ ${1:-} != --dry-run ]] || { dry=1 && shift; }
extra=''
if compgen -G '/dev/accel*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null; then extra='[tpu]'; fi
step python3 -m pip install --quiet --editable ".$extra"
PYTHON=python3 step bash launch/run.sh --config=configs/zero.py --workdir="${WORKDIR:-runs/zero}" "$@"
