#!/usr/bin/env bash
# What every host runs: launch/run.sh [--dry-run] --config=configs/zero.py --workdir=DIR ...
#
# The arguments are those of r1jax.main. When a host died, a device failed or one was told to end (code 75, or a signal),
# the same command goes on from the last checkpoint, at most R1JAX_RESTARTS times; an error of any host ends it on all
# (code 1).
set -uo pipefail
cd "$(dirname "$0")/.." || exit
# shellcheck source=launch/env.sh
source launch/env.sh

PYTHON=${PYTHON:-python}
if [[ ${1:-} == --dry-run ]]; then
  shift
  env | grep -E '^(JAX_|LIBTPU_|R1JAX_|TPU_|TF_CPP)' | sort
  printf '%q ' "$PYTHON" -m r1jax.main "$@"
  echo
  exit
fi

for ((attempt = 0; ; attempt++)); do
  "$PYTHON" -m r1jax.main "$@"
  code=$?
  if ((code == 0 || code == 1 || code == 2 || attempt >= R1JAX_RESTARTS)); then
    exit "$code"
  fi
  echo "run.sh: ended with code $code; attempt $((attempt + 1)) of $R1JAX_RESTARTS in 10 s" >&2
  sleep 10 &
  wait $!
done
