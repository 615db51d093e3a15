"""Laws of the TPU kernels: interpreted they compute what the plain versions do, and they compile for TPUs."""

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from tiny import DEEPSEEK, QWEN, jit, one_device, random_params

from r1jax.draw import DrawConfig
from r1jax.model import blockwise, experts, mla
from r1jax.model.blockwise import Reading
from r1jax.model.kernels import flash
from r1jax.model.kernels.mla_decode import mla_decode
from r1jax.sampler import sample
from r1jax.slots import SamplerConfig, Verbs
from r1jax.types import Request

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("interpret", [True, pltpu.InterpretParams()], ids=["steps", "memory"])
@pytest.mark.parametrize(
    ("lengths", "length"), [((0, 1, 16, 40, 17, 33), 40), ((0, 0, 48), 48), ((0, 0, 0, 0), 16)], ids=str
)
def test_reading_a_ragged_cache_is_plain_attention(lengths: tuple[int, ...], length: int, interpret: object) -> None:
    n, width, rank = len(lengths), 24, 16
    q, cache = normal(0, n, 3, width), normal(1, n, length, width)
    want = jit(mla.read_plain, static_argnums=(3, 4))(q, cache, jnp.array(lengths), rank, 0.4)
    # What lies past a slot's length must not matter, whatever it is.
    cache = np.where(np.arange(length)[:, None] < np.array(lengths)[:, None, None], cache, 1e4)
    run = jit(lambda *given: mla_decode(*given, rank, 0.4, block=16, interpret=interpret))
    got = run(q, cache, jnp.array(lengths))
    assert not np.any(got[np.array(lengths) == 0]) and np.all(np.abs(want).max((1, 2)) > 0.1) == (0 not in lengths)
    np.testing.assert_allclose(got, want, **CLOSE)


def test_tokens_drawn_with_the_kernel_are_the_plain_ones() -> None:
    params, found = random_params(DEEPSEEK), {}
    requests = [Request(i, member, ids) for i, ids in enumerate([(5, 6, 7), (3,)]) for member in range(3)]
    for path in ("plain", "kernel"):
        sizes = SamplerConfig(slots=4, tokens_per_dispatch=4, cache_bucket=16, prefill_prompts=2, attention=path)
        verbs = Verbs(DEEPSEEK, sizes, DrawConfig(), one_device()["decode"], [7])
        verbs.prefill, verbs.insert, verbs.generate = jit(verbs.prefill), jit(verbs.insert), jit(verbs.generate)
        done = sample(verbs, params, requests, jax.random.key(3), 10)
        found[path] = {(c.prompt, c.member): c for c in done}
    for name, want in found["plain"].items():
        np.testing.assert_array_equal(found["kernel"][name].tokens, want.tokens)
        np.testing.assert_allclose(found["kernel"][name].logp, want.logp, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("g", [1, 3])
def test_long_rows_in_kernels_are_long_rows_in_blocks(g: int) -> None:
    b, n, s, start = 2, 40, 72, 24  # the last queries but some of a row, as a device in the middle holds them
    q, k, v, out = normal(0, b, n, 2, g, 6), normal(1, b, s, 2, 6), normal(2, b, s, 2, 5), normal(3, b, n, 2, g, 5)
    keys = np.sort(np.random.default_rng(4).integers(0, 5, (b, s)), axis=1)
    segments = keys[:, start : start + n]
    reading = Reading(segments, np.where(segments == 4, 2, segments), keys, np.int32(start))

    def both(attend, q, k, v, reading):
        y, pull = jax.vjp(lambda *of: attend(*of, reading, 0.3), q, k, v)
        return y, pull(jnp.asarray(out))

    blocks = jit(lambda *of: both(blockwise.attend, *of))(q, k, v, reading)

    def run(*of):
        return flash.attend(*of, blocks=(16, 24), interpret=True)

    kernels = jit(lambda *of: both(run, *of))(q, k, v, reading)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4), kernels, blocks)


def test_a_kernel_for_latents_is_refused_elsewhere() -> None:
    with pytest.raises(ValueError, match=r"config.sampler.attention is 'kernel', .* attention is 'gqa'"):
        Verbs(QWEN, SamplerConfig(attention="kernel"), DrawConfig(), one_device()["decode"], [7])
    with pytest.raises(ValueError, match=r"config.sampler.attention is 'flash', wanted auto, plain, kernel"):
        SamplerConfig(attention="flash")


COMPILE = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from r1jax.model.blockwise import Reading
from r1jax.model.kernels import flash, mla_decode

for name in ("v5e:2x2", "v5p:2x2x1"):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    there = jax.sharding.SingleDeviceSharding(devices[0])
    def like(*shape, dtype=jnp.bfloat16): return jax.ShapeDtypeStruct(shape, dtype, sharding=there)
    def ints(*shape): return like(*shape, dtype=jnp.int32)
    read = lambda q, cache, lengths: mla_decode.mla_decode(q, cache, lengths, 512, 0.1)
    jax.jit(read).lower(like(8, 128, 640), like(8, 8192, 640), ints(8)).compile()
    def loss(q, k, v, *reading): return flash.attend(q, k, v, Reading(*reading), 0.1).astype(jnp.float32).sum()
    rows = [ints(1, 4096)] * 2 + [ints(1, 8192), ints()]
    given = like(1, 4096, 2, 1, 192), like(1, 8192, 2, 192), like(1, 8192, 2, 128), *rows
    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*given).compile().as_text()
    print(name, *sorted({kernel for kernel in ("forward", "queries", "keys") if f"{kernel}_kernel" in text}))
"""


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="no libtpu: pip install libtpu")
def test_kernels_compile_for_tpu() -> None:
    env = os.environ | {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("v5")] == [
        f"{name} forward keys queries" for name in ("v5e:2x2", "v5p:2x2x1")
    ]


@pytest.mark.parametrize("rows", [512, 1280, 72])
def test_the_grouped_product_of_narrow_experts_is_lowered_for_a_tpu(rows: int) -> None:
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((rows, 128), (4, 128, 64)))
    owner, sizes = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (4, 4))

    def loss(x: jax.Array, w: jax.Array, owner: jax.Array, sizes: jax.Array) -> jax.Array:
        return experts._megablox(x, w, owner, sizes).astype(jnp.float32).sum()

    jax.export.export(jax.jit(jax.grad(loss, (0, 1))), platforms=["tpu"])(x, w, owner, sizes)
