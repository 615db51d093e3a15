"""How fast released weights are read, and in how much memory: python -m tests.bench.load --gb=8

Makes a synthetic folder of that size (bfloat16, shards of 5 GB), reads its files plainly, loads it in processes of 1
and 8 simulated devices, deletes it. Each is done from the page cache ("warm") and with the files dropped from it
("cold"). The peak is what a process held beyond its start and the arrays that were already on their devices, as a
multiple of the largest stacked leaf (a single process holds all of it); on a CPU a leaf's own arrays count, too.
"""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

BLOCK_BYTES = 1 << 24
LAYERS = 16


def config_of(gb: float) -> dict:
    """Keyword arguments of a ModelConfig whose weights take about so many GB (1e9 bytes) in bfloat16."""
    # A layer has 2.5 + 10.5 squares of the width, the vocabulary twice 16.
    width = max(1, round(math.sqrt(gb * 1e9 / 2 / (13 * LAYERS + 32)) / 128)) * 128
    return {
        "vocab_size": 16 * width,
        "hidden_size": width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 256,
        "head_dim": 64,
        "intermediate_size": width * 7 // 2,
    }


def make(folder: pathlib.Path, gb: float) -> int:
    """Writes the folder of random weights; its bytes."""
    from r1jax.model import safetensors_io, tensors
    from r1jax.model.config import ModelConfig
    from r1jax.model.families import config_to_hf

    config = ModelConfig(**config_of(gb))
    noise = np.random.default_rng(0).standard_normal(BLOCK_BYTES // 4, np.float32)
    noise = noise.astype(safetensors_io.DTYPES["BF16"])
    size, out = tensors.sizes(config), []
    for entry in tensors.entries(config):
        shape = tensors.stored_shape(entry.row, size)
        out += [
            safetensors_io.Tensor(name, noise.dtype, shape, lambda shape=shape: np.resize(noise, shape))
            for name in entry.names
        ]
    safetensors_io.write_folder(folder, out, {**config_to_hf(config), "torch_dtype": "bfloat16"})
    return sum(tensor.nbytes for tensor in out)


def forget(folder: pathlib.Path) -> None:
    """Drops the files from the page cache."""
    os.sync()
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_plainly(folder: pathlib.Path) -> float:
    """Seconds that one thread takes to read all files into one buffer of 16 MB."""
    buffer, start_s = bytearray(BLOCK_BYTES), time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - start_s


def rss() -> int:
    """Bytes of this process in memory."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def load(folder: pathlib.Path) -> dict[str, float]:
    """Loads in this process onto all of its devices; seconds and peak."""
    import jax

    from r1jax.model import convert
    from r1jax.sharding import make_mesh

    mesh = make_mesh({"fsdp": -1})
    jax.block_until_ready(jax.device_put(np.ones(8), jax.devices()[-1]))
    placed, largest, peak, is_over = 0, 0, 0, threading.Event()
    before, assemble = rss(), convert.assemble

    def counted(*given: object) -> dict:
        nonlocal placed, largest
        leaves = assemble(*given)
        largest = max(largest, *(leaf.nbytes for leaf in leaves.values()))
        placed += sum(leaf.nbytes for leaf in leaves.values())
        return leaves

    def watch() -> None:
        nonlocal peak
        while not is_over.wait(0.002):
            now = placed  # first, so that an array is never taken away before it counts
            peak = max(peak, rss() - before - now)

    convert.assemble = counted
    watcher = threading.Thread(target=watch)
    watcher.start()
    start_s = time.perf_counter()
    jax.block_until_ready(convert.load(folder, mesh)[1])
    seconds = time.perf_counter() - start_s
    is_over.set()
    watcher.join()
    return {"seconds": seconds, "peak_over_largest": peak / largest, "largest_gb": largest / 1e9}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=8, help="size of the folder, 1e9 bytes")
    parser.add_argument("--at", default=tempfile.gettempdir(), help="where to make it")
    parser.add_argument("--load", help=argparse.SUPPRESS)  # a process of its own: load this folder
    asked = parser.parse_args()
    if asked.load:
        print(json.dumps(load(pathlib.Path(asked.load))))
        return
    with tempfile.TemporaryDirectory(dir=asked.at) as made:
        folder = pathlib.Path(made) / "model"
        gb = make(folder, asked.gb) / 1e9
        print(f"{gb:.2f} GB in {len(list(folder.glob('*.safetensors')))} files", flush=True)
        for kind in ("warm", "cold"):
            if kind == "cold":
                forget(folder)
            else:
                read_plainly(folder)
            plain_s = read_plainly(folder)
            print(f"{kind}: plain reading {gb / plain_s:5.2f} GB/s", flush=True)
            for devices in (1, 8):
                if kind == "cold":
                    forget(folder)
                flags = f"--xla_force_host_platform_device_count={devices}"
                words = [sys.executable, "-m", "tests.bench.load", f"--load={folder}"]
                env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
                done = subprocess.run(words, env=env, stdout=subprocess.PIPE, text=True, check=True)
                got = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"{kind}: {devices} devices {gb / got['seconds']:5.2f} GB/s "
                    f"({plain_s / got['seconds']:.2f} of plain reading), peak {got['peak_over_largest']:.2f} times "
                    f"the largest leaf of {got['largest_gb']:.2f} GB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
