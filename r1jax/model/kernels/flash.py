"""Attention over long packed rows as TPU kernels, forward and backward (FlashAttention-2, arXiv 2307.08691).

As model/blockwise.py computes it, with its rule of who may read whom: splash attention, which jax brings, knows
segments that are equal, but not a prompt that all of its completions read. The grid walks a list of the pairs of blocks
that meet at all. Scores lie transposed, keys in rows, so that what belongs to a query is a row of lanes.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from r1jax.model.blockwise import ATTENDED, NEVER, Reading, may_meet, whole_blocks

QUERIES, KEYS = 512, 1024  # tokens of a block
VMEM_BYTES = 64 * 2**20  # of 128 MB that v5e, v5p and v6e have

Ref = Any  # Pallas's handle of memory
Results = list[tuple[str, int, Any]]

ROW_BY_ROW = (((1,), (1,)), ((), ()))  # a @ b.T
COLUMN_BY_COLUMN = (((0,), (0,)), ((), ()))  # a.T @ b


def attend(
    q: Float[Array, "B Q K g h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K w"],
    reading: Reading,
    scale: float,
    blocks: tuple[int, int] = (QUERIES, KEYS),
    interpret: Any = False,
) -> Float[Array, "B Q K g w"]:
    """Softmax attention with g query heads per key head; `interpret` runs it step by step on any device."""
    b, n, kv, g, h = q.shape
    blocks = min(blocks[0], n), min(blocks[1], k.shape[1])
    q, k, v, reading = whole_blocks(q, k, v, reading, *blocks)
    heads = q.reshape(b, -1, kv * g, h).swapaxes(1, 2)
    out = _attend(heads, k.swapaxes(1, 2), v.swapaxes(1, 2), reading, scale, blocks, interpret)
    return out.swapaxes(1, 2)[:, :n].reshape(b, n, kv, g, -1)


def _pairs(meet: Bool[Array, "B nq nk"], by_keys: bool) -> tuple[Array, Array, Array]:
    """Blocks of queries and of keys that meet, in the order of the one or the other, and how many; -1 at both ends."""
    b, nq, nk = meet.shape
    if by_keys:  # a block of keys that nobody reads still has a gradient, of zeros
        meet = meet.at[:, 0].set(meet[:, 0] | ~meet.any(1)).swapaxes(1, 2)
    flat = meet.reshape(b, -1)
    order, count = jnp.argsort(~flat, axis=1, stable=True), flat.sum(1)
    first, second = jnp.divmod(order, nq if by_keys else nk)
    both = (second, first) if by_keys else (first, second)
    listed = jnp.arange(nq * nk) < count[:, None]
    both = (jnp.pad(jnp.where(listed, a, -1), ((0, 0), (1, 1)), constant_values=-1) for a in both)
    return *(a.reshape(-1).astype(jnp.int32) for a in both), count.astype(jnp.int32)


class _Step:
    """Where a step of the grid (row, head, pair) stands."""

    def __init__(self, row: Array, pair: Array, of_queries: Ref, of_keys: Ref, counts: Ref, own: int) -> None:
        width = of_queries.shape[0] // counts.shape[0]
        at = row * width + 1 + jnp.minimum(pair, counts[row] - 1)
        self.queries, self.keys = of_queries[at], of_keys[at]
        is_real, mine = pair < counts[row], (of_queries, of_keys)[own]
        self.is_real = is_real
        self.is_first = is_real & (mine[at - 1] != mine[at])
        self.is_last = is_real & (mine[at + 1] != mine[at])


def _weights(step: _Step, start: Ref, refs: tuple, scale: float) -> Float[Array, "s q"]:
    """Scores of a pair of blocks, NEVER where nothing may be read."""
    q, k, segments, parents, keys = refs
    scores = jax.lax.dot_general(k[0, 0], q[0, 0], ROW_BY_ROW, preferred_element_type=jnp.float32) * scale
    s, n = scores.shape
    place = step.keys * s + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    asks = start[0] + step.queries * n + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    mine = (keys[0] == segments[0]) | (keys[0] == parents[0])
    return jnp.where(mine & (place <= asks), scores, NEVER)


def _forward_kernel(of_queries, of_keys, counts, start, q, k, v, *refs, scale: float) -> None:  # noqa: ANN001, ANN002
    segments, parents, keys, out, lse, top, total, acc = refs
    step = _Step(pl.program_id(0), pl.program_id(2), of_queries, of_keys, counts, own=0)

    @pl.when(step.is_first)
    def _() -> None:
        top[...] = jnp.full_like(top, NEVER)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    @pl.when(step.is_real)
    def _() -> None:
        scores = _weights(step, start, (q, k, segments, parents, keys), scale)
        new_top = jnp.maximum(top[...], scores.max(axis=0, keepdims=True))
        weights = jnp.exp(scores - new_top)
        shrink = jnp.exp(top[...] - new_top)
        top[...] = new_top
        total[...] = shrink * total[...] + weights.sum(axis=0, keepdims=True)
        values = v[0, 0]
        read = jax.lax.dot_general(
            values, weights.astype(values.dtype), COLUMN_BY_COLUMN, preferred_element_type=jnp.float32
        )
        acc[...] = shrink * acc[...] + read

    @pl.when(step.is_last)
    def _() -> None:
        out[0, 0] = (acc[...] / total[...]).T.astype(out.dtype)
        lse[0, 0] = top[...] + jnp.log(total[...])


def _d_scores(step, start, refs, values, grad, lse, inner, scale: float) -> tuple[Array, Array]:  # noqa: ANN001
    """Weights of a pair of blocks and the gradient of its products of queries and keys."""
    weights = jnp.exp(_weights(step, start, refs, scale) - lse[0, 0])
    d_weights = jax.lax.dot_general(values[0, 0], grad[0, 0], ROW_BY_ROW, preferred_element_type=jnp.float32)
    return weights, weights * (d_weights - inner[0, 0]) * scale


def _queries_kernel(of_queries, of_keys, counts, start, q, k, v, *refs, scale: float) -> None:  # noqa: ANN001, ANN002
    segments, parents, keys, grad, lse, inner, dq, acc = refs
    step = _Step(pl.program_id(0), pl.program_id(2), of_queries, of_keys, counts, own=0)

    @pl.when(step.is_first)
    def _() -> None:
        acc[...] = jnp.zeros_like(acc)

    @pl.when(step.is_real)
    def _() -> None:
        _, d = _d_scores(step, start, (q, k, segments, parents, keys), v, grad, lse, inner, scale)
        there = k[0, 0]
        acc[...] += jax.lax.dot_general(
            d.astype(there.dtype), there, COLUMN_BY_COLUMN, preferred_element_type=jnp.float32
        )

    @pl.when(step.is_last)
    def _() -> None:
        dq[0, 0] = acc[...].astype(dq.dtype)


def _keys_kernel(of_queries, of_keys, counts, start, q, k, v, *refs, scale: float) -> None:  # noqa: ANN001, ANN002
    segments, parents, keys, grad, lse, inner, dk, dv, k_acc, v_acc = refs
    step = _Step(pl.program_id(0), pl.program_id(2), of_queries, of_keys, counts, own=1)

    @pl.when(step.is_first)
    def _() -> None:
        k_acc[...] = jnp.zeros_like(k_acc)
        v_acc[...] = jnp.zeros_like(v_acc)

    @pl.when(step.is_real)
    def _() -> None:
        weights, d = _d_scores(step, start, (q, k, segments, parents, keys), v, grad, lse, inner, scale)
        mine, grads = q[0, 0], grad[0, 0]
        k_acc[...] += jnp.dot(d.astype(mine.dtype), mine, preferred_element_type=jnp.float32)
        v_acc[...] += jnp.dot(weights.astype(grads.dtype), grads, preferred_element_type=jnp.float32)

    @pl.when(step.is_last)
    def _() -> None:
        dk[0, 0] = k_acc[...].astype(dk.dtype)
        dv[0, 0] = v_acc[...].astype(dv.dtype)


def _call(
    kernel: Callable,
    by_keys: bool,
    reading: Reading,
    arrays: tuple[Array, ...],
    results: Results,
    scratch: list[tuple[int, int]],
    products: int,
    scale: float,
    blocks: tuple[int, int],
    interpret: Any,
) -> Sequence[Array]:
    """One of the kernels; `results` are "queries", "keys" or "row" (a number per query), each with width and dtype."""
    q, k, v = arrays[:3]
    b, heads, n, _ = q.shape
    g = heads // k.shape[1]
    bq, bk = blocks
    of_queries, of_keys, counts = _pairs(may_meet(reading, bq, bk), by_keys)

    def at(row: Array, head: Array, pair: Array, *prefetched: Ref) -> tuple[Array, Array, _Step]:
        return row, head, _Step(row, pair, *prefetched[:3], own=0)

    def queries(*step: Any) -> tuple:
        row, head, here = at(*step)
        return row, head, here.queries, 0

    def a_row(*step: Any) -> tuple:
        row, head, here = at(*step)
        return row, head, 0, here.queries

    def shared(*step: Any) -> tuple:
        row, head, here = at(*step)
        return row, jax.lax.div(head, g), here.keys, 0

    def keys(*step: Any) -> tuple:
        row, head, here = at(*step)
        return row, head, here.keys, 0

    def ids(*step: Any) -> tuple:
        row, _, here = at(*step)
        return row, 0, here.queries

    def key_ids(*step: Any) -> tuple:
        row, _, here = at(*step)
        return row, here.keys, 0

    def of_queries_spec(a: Array) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, bq, a.shape[-1]), queries)

    rows = pl.BlockSpec((1, 1, 1, bq), a_row)
    in_specs = [of_queries_spec(q), *(pl.BlockSpec((1, 1, bk, a.shape[-1]), shared) for a in (k, v))]
    in_specs += [pl.BlockSpec((1, 1, bq), ids)] * 2 + [pl.BlockSpec((1, bk, 1), key_ids)]
    in_specs += [of_queries_spec(a) if a.shape[2] == n else rows for a in arrays[3:]]
    kinds = {
        "queries": lambda w: ((b, heads, n, w), pl.BlockSpec((1, 1, bq, w), queries)),
        "keys": lambda w: ((b, heads, k.shape[2], w), pl.BlockSpec((1, 1, bk, w), keys)),
        "row": lambda w: ((b, heads, w, n), rows),
    }
    out = [(*kinds[kind](width), dtype) for kind, width, dtype in results]
    share = 1 - n / (2 * k.shape[2])  # of all pairs, those that causal rows have, for the last queries
    flops = 2 * b * heads * n * k.shape[2] * share * products
    pairs = b * heads * (n // bq) * (k.shape[2] // bk) * share
    moved = pairs * (bk if not by_keys else bq) * (k.shape[-1] + v.shape[-1]) * k.dtype.itemsize
    return pl.pallas_call(
        partial(kernel, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(b, heads, counts.max()),
            in_specs=in_specs,
            out_specs=[spec for _, spec, _ in out],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, _, dtype in out],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=int(flops), bytes_accessed=int(moved), transcendentals=int(b * heads * n * k.shape[2] * share)
        ),
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )(
        of_queries,
        of_keys,
        counts,
        reading.start.reshape(1).astype(jnp.int32),
        *arrays[:3],
        reading.segments[:, None],
        reading.parents[:, None],
        reading.keys[..., None],
        *arrays[3:],
    )


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attend(q, k, v, reading, scale, blocks, interpret):  # noqa: ANN001, ANN202
    return _forward(q, k, v, reading, scale, blocks, interpret)[0]


def _forward(q, k, v, reading, scale, blocks, interpret):  # noqa: ANN001, ANN202
    w = v.shape[-1]
    results = [("queries", w, v.dtype), ("row", 1, jnp.float32)]
    scratch = [(1, blocks[0]), (1, blocks[0]), (w, blocks[0])]
    products = q.shape[-1] + w
    found = _call(_forward_kernel, False, reading, (q, k, v), results, scratch, products, scale, blocks, interpret)
    out, lse = (checkpoint_name(a, ATTENDED) for a in found)
    return out, (q, k, v, reading, out, lse)


def _backward(scale, blocks, interpret, saved, grad):  # noqa: ANN001, ANN202
    q, k, v, reading, out, lse = saved
    (h, w), (bq, bk) = (q.shape[-1], v.shape[-1]), blocks
    inner = (out.astype(jnp.float32) * grad).sum(-1)[:, :, None]
    arrays = q, k, v, grad, lse, inner
    (dq,) = _call(
        _queries_kernel,
        False,
        reading,
        arrays,
        [("queries", h, q.dtype)],
        [(bq, h)],
        2 * h + w,
        scale,
        blocks,
        interpret,
    )
    results = [("keys", h, k.dtype), ("keys", w, v.dtype)]
    scratch = [(bk, h), (bk, w)]
    dk, dv = _call(_keys_kernel, True, reading, arrays, results, scratch, 2 * h + 2 * w, scale, blocks, interpret)

    def of_key_heads(a: Array) -> Array:
        return a.reshape(a.shape[0], k.shape[1], -1, *a.shape[2:]).sum(2)

    return dq, of_key_heads(dk), of_key_heads(dv), None


_attend.defvjp(_forward, _backward)
