# shellcheck shell=bash
# Every variable and flag that a host of a pod runs with, in one place; all scripts of this folder read it.
# A value that the caller has set stays. None of it has been timed on a TPU: the flags are those that TPU projects
# publish for JAX. R1JAX_TPU says which TPUs these are (v5p-128, tpu-v5p-slice); the scripts set it.

# Compiled programs, so that a run which starts again does not compile again. A folder that all hosts share.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-${R1JAX_SHARED:-$HOME}/jax_cache}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-1}"

# How often a host runs the command again after a death, a device's failure or a preemption (code 75, or a signal).
export R1JAX_RESTARTS="${R1JAX_RESTARTS:-100}"

# Warnings and worse; at 0 libtpu and XLA write hundreds of lines per host.
export TPU_MIN_LOG_LEVEL="${TPU_MIN_LOG_LEVEL:-2}" TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-1}"

if [[ -z ${LIBTPU_INIT_ARGS:-} ]]; then
  flags=(
    # Collectives run beside the arithmetic that does not need them, several steps of one at a time.
    --xla_tpu_enable_async_collective_fusion=true
    --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
    --xla_tpu_enable_async_collective_fusion_multiple_steps=true
    --xla_tpu_overlap_compute_collective_tc=true
    --xla_enable_async_all_gather=true
    # Between slices: the sums of gradients of the data axis over DCN, of any sizes together.
    --xla_tpu_enable_data_parallel_all_reduce_opt=true
    --xla_tpu_data_parallel_opt_different_sized_ops=true
  )
  # Exchanges of tokens between experts too, where the torus has three dimensions: for v5e the compiler refuses.
  case ${R1JAX_TPU:-} in *v4* | *v5p* | *7x*) flags+=(--xla_tpu_enable_async_all_to_all=true) ;; esac
  export LIBTPU_INIT_ARGS="${flags[*]}"
fi

# Set by the platform, not here: on TPU VMs and GKE jax finds the hosts by itself, and MEGASCALE_* names the slices.
# Anywhere else: JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID, on every host.
