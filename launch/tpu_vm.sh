#!/usr/bin/env bash
# A run on TPU VMs by queued resources: waits for the slice, installs this commit on every host, runs, and asks for a new
# slice when a spot one is taken away; the run goes on from the last checkpoint in the bucket.
#
#   launch/tpu_vm.sh --name=zero --zone=us-east5-a --type=v5p-128 --bucket=my-bucket [--slices=2] [--spot] [--dry-run] \
#     -- --config=configs/zero.py [--config.KEY=VALUE ...]
#
# The bucket is mounted on every host at /mnt/r1jax (gcsfuse; a hierarchical namespace makes renames atomic), and the run
# folder is /mnt/r1jax/NAME. Logs: ~/r1jax.log on every host. Ctrl-C leaves the slice as it is; a second call goes on.
set -euo pipefail
cd "$(dirname "$0")/.."

name='' zone='' type='' bucket='' slices=1 spot='' dry='' poll_s=60
while (($#)); do
  case $1 in
    --name=* | --zone=* | --type=* | --bucket=* | --slices=*) printf -v "$(cut -d= -f1 <<<"${1#--}")" %s "${1#*=}" ;;
    --spot) spot=1 ;;
    --dry-run) dry=1 ;;
    --) shift && break ;;
    *) echo "tpu_vm.sh: what is $1? The arguments are in its first lines" >&2 && exit 2 ;;
  esac
  shift
done
for needed in name zone type bucket; do
  [[ -n ${!needed} ]] || { echo "tpu_vm.sh: --$needed=... is missing" >&2 && exit 2; }
done
case $type in # the image for each generation
  v4-*) runtime=tpu-ubuntu2204-base ;;
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *) echo "tpu_vm.sh: --type=$type: wanted v4-N, v5litepod-N, v5p-N or v6e-N (TPU7x: launch/gke.sh)" >&2 && exit 2 ;;
esac

step() {
  if [[ -n $dry ]]; then
    printf '%q ' "$@" && echo
  else
    "$@"
  fi
}
tpus=(gcloud compute tpus queued-resources)
state() {
  [[ -n $dry ]] && echo ACTIVE && return
  "${tpus[@]}" describe "$name" --zone="$zone" --format='value(state.state)' 2>/dev/null || echo NONE
}
on_all() { step "${tpus[@]}" ssh "$name" --zone="$zone" --node=all --worker=all --command="$1"; }

create() {
  local how=(--zone="$zone" --accelerator-type="$type" --runtime-version="$runtime")
  if ((slices > 1)); then how+=(--node-count="$slices" --node-prefix="$name"); else how+=(--node-id="$name"); fi
  [[ -z $spot ]] || how+=(--spot)
  step "${tpus[@]}" create "$name" "${how[@]}"
}

install() {
  step git archive --output=/tmp/r1jax.tar.gz HEAD
  step "${tpus[@]}" scp /tmp/r1jax.tar.gz "$name:r1jax.tar.gz" --zone="$zone" --node=all --worker=all
  # The image's Python is older than r1jax needs.
  on_all "set -e
    mkdir -p r1jax && tar xzf r1jax.tar.gz -C r1jax && cd r1jax
    python3 -m pip install --quiet --user uv
    test -d .venv || python3 -m uv venv --quiet --python 3.12 .venv
    python3 -m uv pip install --quiet --python .venv/bin/python --constraint requirements.lock '.[tpu]'
    sudo mkdir -p /mnt/r1jax
    mountpoint -q /mnt/r1jax || sudo gcsfuse --implicit-dirs --rename-dir-limit=100000 -o allow_other $bucket /mnt/r1jax"
}

begin() {
  local command
  command="$(printf '%q ' r1jax/launch/run.sh "$@" --workdir="/mnt/r1jax/$name")> r1jax.log 2>&1; echo \$? > r1jax.exit"
  on_all "rm -f r1jax.exit
    R1JAX_SHARED=/mnt/r1jax R1JAX_TPU=$type PYTHON=.venv/bin/python nohup bash -c $(printf %q "$command") > /dev/null 2>&1 &"
}

[[ $(state) != NONE && -z $dry ]] || create
while true; do
  until [[ $(state) == ACTIVE ]]; do
    case $(state) in
      SUSPENDED | SUSPENDING | FAILED | NONE) # a spot slice that was taken away never comes back by itself
        step "${tpus[@]}" delete "$name" --zone="$zone" --force --quiet || true
        create
        ;;
    esac
    sleep "$poll_s"
  done
  install
  begin "$@"
  code=''
  while [[ -z $dry && -z $code && $(state) == ACTIVE ]]; do
    sleep "$poll_s"
    code=$("${tpus[@]}" ssh "$name" --zone="$zone" --command='cat r1jax.exit 2>/dev/null || true' 2>/dev/null || true)
  done
  [[ -z $dry && -z $code ]] && continue
  step "${tpus[@]}" ssh "$name" --zone="$zone" --command='tail -n 20 r1jax.log'
  echo "The slice is still yours (and costs): gcloud compute tpus queued-resources delete $name --zone=$zone --force"
  exit "${code:-0}"
done
