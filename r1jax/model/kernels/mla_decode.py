"""Decode attention over a ragged latent cache (absorbed MLA, arXiv 2405.04434, section 2.1) as one TPU kernel.

All heads of a slot read the same latents, which are keys and, in their first part, values: each block of the cache
comes in once and is used twice. Softmax runs along (FlashAttention, arXiv 2205.14135). The grid counts only blocks
that hold something, as megablox's does, so a slot costs what it has cached and a free one nothing.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

LANES = 128  # a cache whose width is a multiple of these is read without copying it into another layout
BLOCK = 1024  # cached tokens at once; a step of the grid costs about 0.35 us whatever it does

NEVER = -1e30

Ref = Any  # Pallas's handle of memory


def _kernel(
    slot_of: Ref,
    block_of: Ref,
    lengths: Ref,
    q: Ref,
    cache: Ref,
    out: Ref,
    top: Ref,
    total: Ref,
    acc: Ref,
    *,
    scale: float,
    rank: int,
    has_tail: bool,
    steps: int,
) -> None:
    at = pl.program_id(0) * steps + pl.program_id(1)
    block, length = block_of[at], lengths[slot_of[at]]
    size = cache.shape[1]
    start = block * size

    @pl.when(block == 0)
    def _() -> None:
        top[...] = jnp.full_like(top, NEVER)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    @pl.when(start < length)
    def _() -> None:
        latents = cache[0]
        if has_tail:  # past the end of the array stands anything, NaN too
            row = start + jax.lax.broadcasted_iota(jnp.int32, latents.shape, 0)
            latents = jnp.where(row < length, latents, 0)
        scores = jax.lax.dot_general(q[0], latents, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        column = start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        scores = jnp.where(column < length, scores * scale, NEVER)
        new_top = jnp.maximum(top[...], scores.max(axis=1, keepdims=True))
        weights = jnp.exp(scores - new_top)
        shrink = jnp.exp(top[...] - new_top)
        top[...] = new_top
        total[...] = shrink * total[...] + weights.sum(axis=1, keepdims=True)
        read = jnp.dot(weights.astype(latents.dtype), latents[:, :rank], preferred_element_type=jnp.float32)
        acc[...] = shrink * acc[...] + read

    @pl.when((start < length) & (start + size >= length))
    def _() -> None:
        out[0] = (acc[...] / total[...]).astype(out.dtype)


def _schedule(
    lengths: Int[Array, "B"], block: int, most: int, cores: int
) -> tuple[Int[Array, "steps"], Int[Array, "steps"], Int[Array, ""]]:
    """Slot and block of every step, one core's after the other's, and how many steps the busier core takes."""
    each = (-(-lengths // block)).reshape(cores, -1)
    ends = jnp.cumsum(each, axis=1)
    steps = jnp.arange(each.shape[1] * most)
    slot = jax.vmap(lambda ends: jnp.searchsorted(ends, steps, side="right"))(ends)
    is_idle = slot == each.shape[1]
    slot = jnp.minimum(slot, each.shape[1] - 1)
    first = jnp.take_along_axis(ends - each, slot, axis=1)
    # An idle step stands past the end of the core's last slot: nothing is read or written there.
    block_of = jnp.where(is_idle, most, steps - first)
    slot += jnp.arange(cores)[:, None] * each.shape[1]
    return slot.reshape(-1), block_of.reshape(-1), ends[:, -1].max()


@partial(jax.jit, static_argnames=("rank", "scale", "block", "interpret"))
def mla_decode(
    q: Float[Array, "B H w"],
    cache: Float[Array, "B S w"],
    lengths: Int[Array, "B"],
    rank: int,
    scale: float,
    block: int = BLOCK,
    interpret: Any = False,
) -> Float[Array, "B H c"]:
    """Softmax of scaled products with the first `lengths` cached rows, times the first `rank` values of those rows.

    Args:
        lengths: 0..S per slot; the result of an empty slot is zero.
        interpret: true or pltpu.InterpretParams() runs the kernel's steps one after the other on any device.
    """
    b, heads, width = q.shape
    length = cache.shape[1]
    block = min(block, length)
    most = -(-length // block)
    cores = (
        2 if b % 2 == 0 else 1
    )  # of a v4 or v5p chip, which share a parallel axis of the grid; others do them in turn
    slot_of, block_of, steps = _schedule(lengths, block, most, cores)
    per_core = b // cores * most

    def of_slot(core: Array, step: Array, slot_of: Ref, block_of: Ref, lengths: Ref) -> tuple:
        del block_of, lengths
        return slot_of[core * per_core + step], 0, 0

    def of_block(core: Array, step: Array, slot_of: Ref, block_of: Ref, lengths: Ref) -> tuple:
        at = core * per_core + step
        last = jnp.maximum(
            jax.lax.div(lengths[slot_of[at]] - 1, block), 0
        )  # an idle step stays where the one before was
        return slot_of[at], jnp.minimum(block_of[at], last), 0

    out = pl.pallas_call(
        partial(_kernel, scale=scale, rank=rank, has_tail=bool(length % block), steps=per_core),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cores, jnp.maximum(steps, 1)),
            in_specs=[pl.BlockSpec((1, heads, width), of_slot), pl.BlockSpec((1, block, width), of_block)],
            out_specs=pl.BlockSpec((1, heads, rank), of_slot),
            scratch_shapes=[pltpu.VMEM((heads, n), jnp.float32) for n in (1, 1, rank)],
        ),
        out_shape=jax.ShapeDtypeStruct((b, heads, rank), q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=cost(b, heads, length, width, rank, cache.dtype.itemsize),
        interpret=interpret,
        name="mla_decode",
    )(slot_of, block_of, lengths, q, cache)
    return jnp.where((lengths > 0)[:, None, None], out, 0)


def cost(slots: int, heads: int, length: int, width: int, rank: int, itemsize: int) -> pl.CostEstimate:
    """What it takes where every slot is full."""
    read = slots * length
    return pl.CostEstimate(
        flops=2 * read * heads * (width + rank),
        bytes_accessed=itemsize * (read * width + slots * heads * (width + rank)),
        transcendentals=read * heads,
    )
