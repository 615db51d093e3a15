#!/usr/bin/env bash
# A run by xpk (pip install xpk), which writes the JobSet itself and queues it with Kueue.
#
#   launch/xpk.sh --name=zero --cluster=CLUSTER --zone=us-east5-a --type=v5p-128 --image=IMAGE --shared=/mnt/shared \
#     [--slices=2] [--restarts=100] [--dry-run] -- --config=configs/zero.py [--config.KEY=VALUE ...]
#
# IMAGE is what launch/Dockerfile builds; --shared is where an xpk storage (xpk storage attach) is mounted on all pods.
# Spot or reserved is a property of the cluster (xpk cluster create --spot).
set -euo pipefail

name='' cluster='' zone='' type='' image='' shared='' slices=1 restarts=100 dry=''
while (($#)); do
  case $1 in
    --name=* | --cluster=* | --zone=* | --type=* | --image=* | --shared=* | --slices=* | --restarts=*)
      printf -v "$(cut -d= -f1 <<<"${1#--}")" %s "${1#*=}"
      ;;
    --dry-run) dry=1 ;;
    --) shift && break ;;
    *) echo "xpk.sh: what is $1? The arguments are in its first lines" >&2 && exit 2 ;;
  esac
  shift
done
for needed in name cluster zone type image shared; do
  [[ -n ${!needed} ]] || { echo "xpk.sh: --$needed=... is missing" >&2 && exit 2; }
done

command=$(printf '%q ' launch/run.sh --workdir="$shared/$name" "$@")
words=(
  xpk workload create --workload="$name" --cluster="$cluster" --zone="$zone" --tpu-type="$type" --num-slices="$slices"
  --docker-image="$image" --max-restarts="$restarts" --env R1JAX_RESTARTS=0 --env R1JAX_SHARED="$shared"
  --env R1JAX_TPU="$type"
  --command="${command% }"
)
printf '%q ' "${words[@]}" && echo
[[ -n $dry ]] || "${words[@]}"
