#!/usr/bin/env bash
# A run on GKE as a JobSet: one slice or several, one pod per host; prints the manifest and applies it.
#
#   launch/gke.sh --name=zero --image=IMAGE --accelerator=tpu-v5p-slice --topology=4x4x4 --claim=PVC \
#     [--slices=2] [--spot] [--restarts=100] [--dry-run] -- --config=configs/zero.py [--config.KEY=VALUE ...]
#
# IMAGE is what launch/Dockerfile builds; PVC a volume that all pods may write (Filestore, or a bucket by the gcsfuse
# driver), at which the run folder lies. The cluster needs the JobSet controller and a node pool of that topology.
# A preempted or killed pod ends all (code 75), and the JobSet starts them again; an error of the run itself (code 1 of
# every pod) fails the JobSet.
set -euo pipefail

name='' image='' accelerator='' topology='' claim='' slices=1 restarts=100 spot='' dry=''
while (($#)); do
  case $1 in
    --name=* | --image=* | --accelerator=* | --topology=* | --claim=* | --slices=* | --restarts=*)
      printf -v "$(cut -d= -f1 <<<"${1#--}")" %s "${1#*=}"
      ;;
    --spot) spot=1 ;;
    --dry-run) dry=1 ;;
    --) shift && break ;;
    *) echo "gke.sh: what is $1? The arguments are in its first lines" >&2 && exit 2 ;;
  esac
  shift
done
for needed in name image accelerator topology claim; do
  [[ -n ${!needed} ]] || { echo "gke.sh: --$needed=... is missing" >&2 && exit 2; }
done
[[ $topology =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || { echo "gke.sh: --topology=$topology: wanted AxB or AxBxC" >&2 && exit 2; }

chips=$((${topology//x/*}))
on_a_host=$((chips < 4 ? chips : 4))
hosts=$((chips / on_a_host))
selector="cloud.google.com/gke-tpu-accelerator: $accelerator
                cloud.google.com/gke-tpu-topology: $topology"
[[ -z $spot ]] || selector+='
                cloud.google.com/gke-spot: "true"'
arguments=''
for word in --workdir="/shared/$name" "$@"; do
  arguments+="
                    - '${word//\'/\'\'}'"
done

manifest="apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool # a slice of its own for each job
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
      - name: itsOwnError
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $slices
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: r1jax
                  operator: In
                  values: [1, 2]
          template:
            spec:
              restartPolicy: Never
              hostNetwork: true # between slices the pods' own network is slower
              dnsPolicy: ClusterFirstWithHostNet
              terminationGracePeriodSeconds: 300 # to finish a step and save; a spot node gives less
              nodeSelector:
                $selector
              containers:
                - name: r1jax
                  image: $image
                  command: [launch/run.sh]
                  args:$arguments
                  env:
                    - {name: R1JAX_RESTARTS, value: \"0\"} # here the JobSet starts again, all pods at once
                    - {name: R1JAX_SHARED, value: /shared}
                    - {name: R1JAX_TPU, value: $accelerator}
                  ports:
                    - containerPort: 8471 # libtpu
                    - containerPort: 8080 # between slices
                  resources:
                    requests: {google.com/tpu: $on_a_host}
                    limits: {google.com/tpu: $on_a_host}
                  volumeMounts:
                    - {name: shared, mountPath: /shared}
                    - {name: memory, mountPath: /dev/shm}
              volumes:
                - name: shared
                  persistentVolumeClaim: {claimName: $claim}
                - name: memory
                  emptyDir: {medium: Memory}"
echo "$manifest"
[[ -n $dry ]] || kubectl apply -f - <<<"$manifest"
