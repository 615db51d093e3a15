"""What the TPU kernels would take on TPUs that are not here: python -m tests.bench.kernels

Compiles each kernel for a v5e and a v5p core with the compiler that libtpu brings, has it write out its schedule, and
counts the instruction bundles, one a cycle, of a step of the grid. Decoding: a step is 1,024 cached tokens of a
sequence of DeepSeek-V3 (128 heads, latents of 512 + 64 values in bfloat16, 640 as they lie in memory). Attention over
rows: a step is a pair of blocks of one head. Grouped products, by jax's megablox: a step is a tile of 512 rows, 1,024 x
1,024 of an expert's matrix. An estimate: nothing ran.
"""

import math
import pathlib
import re
import subprocess
import sys
import tempfile
from os import environ
from typing import NamedTuple

from r1jax.model import experts
from r1jax.model.kernels import flash


class Chip(NamedTuple):
    """Of the makers' published figures, per chip; the clock is what fits the peak."""

    topology: str
    chips: int
    cores: int
    clock_hz: float
    flops: float
    bytes_per_s: float


CHIPS = {
    "v5e": Chip("v5e:2x2", 256, 1, 1.503e9, 197e12, 819e9),
    "v5p": Chip("v5p:2x2x1", 128, 2, 1.751e9, 459e12, 2765e9),
}
SEQUENCES, LAYERS, HEADS, RANK, ROPE, WIDTH, BLOCK = 1024, 61, 128, 512, 64, 640, 1024
KEY_WIDTH, VALUE_WIDTH = 192, 128

COMPILE = f"""
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from r1jax.model.blockwise import Reading
from r1jax.model.kernels import flash
from r1jax.model.kernels.mla_decode import mla_decode
device = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices[0]
there = jax.sharding.SingleDeviceSharding(device)
def like(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=there)
given = like(8, {HEADS}, {WIDTH}), like(8, {8 * BLOCK}, {WIDTH}), like(8, dtype=jnp.int32)
jax.jit(lambda q, cache, lengths: mla_decode(q, cache, lengths, {RANK}, 0.1, {BLOCK})).lower(*given).compile()
def attention(q, k, v, ids, start):
    return flash.attend(q, k, v, Reading(ids, ids, ids, start), 0.1).astype(jnp.float32).sum()
key, value = like(1, 8192, 8, {KEY_WIDTH}), like(1, 8192, 8, {VALUE_WIDTH})
ids, start = like(1, 8192, dtype=jnp.int32), like(dtype=jnp.int32)
query = like(1, 8192, 8, 1, {KEY_WIDTH})
jax.jit(jax.grad(attention, argnums=(0, 1, 2))).lower(query, key, value, ids, start).compile()
from jax.experimental.pallas.ops.tpu.megablox import ops
def product(x, w, sizes):
    return ops.gmm(x, w, sizes, x.dtype, {(experts.TILE, *experts.TILE_SIDES)}).astype(jnp.float32).sum()
rows = like(24 * {experts.TILE}, 7168), like(2, 7168, 2048), like(2, dtype=jnp.int32)
jax.jit(jax.grad(product, argnums=(0, 1))).lower(*rows).compile()
jax.jit(product).lower(*rows).compile()
"""

# Operations of a step, by kernel.
PAIR = 2 * flash.QUERIES * flash.KEYS
TILE = 2 * experts.TILE * math.prod(experts.TILE_SIDES)
STEPS = {
    "mla_decode": 2 * BLOCK * HEADS * (WIDTH + RANK),
    "forward_kernel": PAIR * (KEY_WIDTH + VALUE_WIDTH),
    "queries_kernel": PAIR * (2 * KEY_WIDTH + VALUE_WIDTH),
    "keys_kernel": PAIR * (2 * KEY_WIDTH + 2 * VALUE_WIDTH),
    # Twice in the kernel, for the last tile along the sum and for the others: a step takes one of them.
    "-gmm.": 2 * TILE,
    "-transpose_jvp_jit_gmm": 2 * TILE,
    "-transpose_jvp_jit_tgmm": TILE,
}


def cycles(chip: Chip) -> dict[str, int]:
    """Bundles of a step of each kernel, with those that only some steps take: an upper bound."""
    with tempfile.TemporaryDirectory() as folder:
        env = {
            **environ,
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
        }
        subprocess.run([sys.executable, "-c", COMPILE, chip.topology], env=env, check=True)
        out = {}
        for name in STEPS:
            (found,) = pathlib.Path(folder).glob(f"*{name}*-schedule-analysis_final_bundles.txt")
            out[name] = int(re.search(r"total scheduled bundles:\s+(\d+)", found.read_text())[1])
        return out


def main() -> None:
    """Prints one row per kernel and chip, then decoding per chip and length."""
    counted = {name: cycles(chip) for name, chip in CHIPS.items()}
    print("| kernel | chip | bundles a step | of the peak |")
    print("| --- | --- | ---: | ---: |")
    for name, chip in CHIPS.items():
        for kernel, bundles in counted[name].items():
            peak = chip.flops / chip.cores / chip.clock_hz  # operations of a core in a cycle
            print(f"| {kernel.strip('-.')} | {name} | {bundles:,} | {STEPS[kernel] / peak / bundles:.0%} |")
    print("\n| chips | tokens | kernel, ms | bandwidth limit, ms | compute limit, ms | of the longer |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, chip in CHIPS.items():
        bundles = counted[name]["mla_decode"]
        for tokens in (8192, 32_768):
            read = SEQUENCES * LAYERS * tokens / chip.chips
            moved = BLOCK * WIDTH * 2 / (chip.bytes_per_s / chip.cores)
            took = read / BLOCK / chip.cores * max(bundles / chip.clock_hz, moved)
            bandwidth = read * (RANK + ROPE) * 2 / chip.bytes_per_s
            compute = read * 2 * HEADS * (2 * RANK + ROPE) / chip.flops
            row = (f"{chip.chips} {name}", f"{tokens:,}", *(f"{1e3 * s:.2f}" for s in (took, bandwidth, compute)))
            print("|", " | ".join((*row, f"{max(bandwidth, compute) / took:.0%}")), "|")


if __name__ == "__main__":
    main()
