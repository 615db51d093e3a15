"""What the MLA decode kernel would take on TPUs that are not here: python -m tests.bench.mla_decode

Compiles the kernel for a v5e and a v5p core with the compiler that libtpu brings, has it write out its schedule, and
counts the instruction bundles, one a cycle, of a step of the grid. A step is 1,024 cached tokens of a sequence of
DeepSeek-V3 (128 heads, latents of 512 + 64 values in bfloat16, 640 as they lie in memory). An estimate: nothing ran.
"""

import pathlib
import re
import subprocess
import sys
import tempfile
from os import environ
from typing import NamedTuple


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

COMPILE = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from r1jax.model.kernels.mla_decode import mla_decode
topology, heads, width, rank, block = sys.argv[1], *map(int, sys.argv[2:])
device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
there = jax.sharding.SingleDeviceSharding(device)
like = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=there)
given = like(8, heads, width), like(8, 8 * block, width), like(8, dtype=jnp.int32)
jax.jit(lambda q, cache, lengths: mla_decode(q, cache, lengths, rank, 0.1, block)).lower(*given).compile()
"""


def cycles(chip: Chip) -> int:
    """Bundles of a step, with those that only a slot's first or last step takes: an upper bound."""
    with tempfile.TemporaryDirectory() as folder:
        env = {
            **environ,
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
        }
        sizes = map(str, (HEADS, WIDTH, RANK, BLOCK))
        subprocess.run([sys.executable, "-c", COMPILE, chip.topology, *sizes], env=env, check=True)
        (found,) = pathlib.Path(folder).glob("*-mla_decode*-schedule-analysis_final_bundles.txt")
        return int(re.search(r"total scheduled bundles:\s+(\d+)", found.read_text())[1])


def main() -> None:
    """Prints one row per chip and length."""
    print("| chips | tokens | bundles a step | kernel, ms | bandwidth limit, ms | compute limit, ms | of the longer |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, chip in CHIPS.items():
        bundles = cycles(chip)
        for tokens in (8192, 32_768):
            read = SEQUENCES * LAYERS * tokens / chip.chips
            moved = BLOCK * WIDTH * 2 / (chip.bytes_per_s / chip.cores)
            took = read / BLOCK / chip.cores * max(bundles / chip.clock_hz, moved)
            bandwidth = read * (RANK + ROPE) * 2 / chip.bytes_per_s
            compute = read * 2 * HEADS * (2 * RANK + ROPE) / chip.flops
            row = (
                f"{chip.chips} {name}",
                f"{tokens:,}",
                f"{bundles:,}",
                *(f"{1e3 * s:.2f}" for s in (took, bandwidth, compute)),
            )
            print("|", " | ".join((*row, f"{max(bandwidth, compute) / took:.0%}")), "|")


if __name__ == "__main__":
    main()
