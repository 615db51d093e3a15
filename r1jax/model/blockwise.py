"""Attention over long rows in blocks: softmax along the keys, nothing of size tokens x tokens in memory.

FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2, in plain JAX; model/kernels/flash.py does the same as TPU
kernels. Scores and softmax are float32. Blocks in which nobody may read anything are left out.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

BLOCK = 512  # tokens
NEVER = -1e30
ATTENDED = "attended"  # names what a layer may keep for its backward pass: transformer.REMAT


class Reading(NamedTuple):
    """Who may read what: query t of a row reads, up to its own place, its own segment and its parent segment.

    `start` is the place of the first query among the keys: of a device that holds a part of the row's tokens.
    """

    segments: Int[Array, "B Q"]
    parents: Int[Array, "B Q"]
    keys: Int[Array, "B S"]
    start: Int[Array, ""]


def attend(
    q: Float[Array, "B Q K g h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K w"],
    reading: Reading,
    scale: float,
    block: int = BLOCK,
) -> Float[Array, "B Q K g w"]:
    """Softmax attention with g query heads per key head."""
    n = q.shape[1]
    block = min(block, n)
    q, k, v, reading = whole_blocks(q, k, v, reading, block, block)
    out = _attend(q.transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2), reading, scale, block)
    return out.transpose(0, 3, 1, 2, 4)[:, :n]


def whole_blocks(
    q: Array, k: Array, v: Array, reading: Reading, queries: int, keys: int
) -> tuple[Array, Array, Array, Reading]:
    """Rows of whole blocks, padded by a segment that nobody reads."""

    def pad(x: Array, block: int, value: int = 0) -> Array:
        missing = -x.shape[1] % block
        return jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)], constant_values=value)

    padded = Reading(
        pad(reading.segments, queries, -1),
        pad(reading.parents, queries, -1),
        pad(reading.keys, keys, -2),
        reading.start,
    )
    return pad(q, queries), pad(k, keys), pad(v, keys), padded


def may_meet(reading: Reading, queries: int, keys: int) -> Bool[Array, "B nq nk"]:
    """Whether any query of a block may read any key of another; true too often, but never false too often."""
    b = reading.segments.shape[0]
    own, above = (a.reshape(b, -1, queries, 1) for a in (reading.segments, reading.parents))
    there = reading.keys.reshape(b, 1, -1, keys)

    def overlap(a: Array) -> Array:
        return (a.min(2) <= there.max(3)) & (there.min(3) <= a.max(2))

    last = reading.start + (jnp.arange(own.shape[1]) + 1) * queries - 1
    return (overlap(own) | overlap(above)) & (jnp.arange(there.shape[2]) * keys <= last[:, None])


def _may_read(reading: Reading, i: Array, j: Array, block: int) -> Bool[Array, "B 1 1 q s"]:
    def cut(a: Array, at: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(a, at * block, block, axis=1)

    keys = cut(reading.keys, j)[:, None, :]
    mine = (cut(reading.segments, i)[:, :, None] == keys) | (cut(reading.parents, i)[:, :, None] == keys)
    place = jnp.arange(block)
    return (mine & (j * block + place <= reading.start + i * block + place[:, None]))[:, None, None]


def _cut(x: Array, at: Array, block: int) -> Array:
    """Block `at` of the tokens, which are the last axis but one."""
    return jax.lax.dynamic_slice_in_dim(x, at * block, block, axis=x.ndim - 2)


def _scores(q: Array, k: Array, reading: Reading, i: Array, j: Array, scale: float) -> Float[Array, "B K g q s"]:
    scores = jnp.einsum("bkgqh,bksh->bkgqs", q, k, preferred_element_type=jnp.float32) * scale
    return jnp.where(_may_read(reading, i, j, q.shape[-2]), scores, NEVER)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q: Array, k: Array, v: Array, reading: Reading, scale: float, block: int) -> Array:
    return _forward(q, k, v, reading, scale, block)[0]


def _forward(q: Array, k: Array, v: Array, reading: Reading, scale: float, block: int) -> tuple[Array, tuple]:
    meet = may_meet(reading, block, block).any(0)

    def of_queries(i: Array) -> tuple[Array, Array]:
        mine = _cut(q, i, block)

        def of_keys(j: Array, carry: tuple) -> tuple:
            top, total, acc = carry
            scores = _scores(mine, _cut(k, j, block), reading, i, j, scale)
            new_top = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            read = jnp.einsum("bkgqs,bksw->bkgqw", weights.astype(v.dtype), _cut(v, j, block))
            return new_top, shrink * total + weights.sum(-1), shrink[..., None] * acc + read.astype(jnp.float32)

        shape = mine.shape[:-1]
        start = jnp.full(shape, NEVER), jnp.zeros(shape), jnp.zeros((*shape, v.shape[-1]))

        def step(j: Array, carry: tuple) -> tuple:
            return jax.lax.cond(meet[i, j], lambda c: of_keys(j, c), lambda c: c, carry)

        top, total, acc = jax.lax.fori_loop(0, meet.shape[1], step, start)
        total = jnp.where(total == 0, 1, total)  # of padding, which may read nothing
        return (acc / total[..., None]).astype(v.dtype), top + jnp.log(total)

    out, lse = jax.lax.map(of_queries, jnp.arange(meet.shape[0]))
    out, lse = (jnp.moveaxis(a, 0, 3).reshape(*q.shape[:-1], *a.shape[5:]) for a in (out, lse))
    out, lse = (checkpoint_name(a, ATTENDED) for a in (out, lse))
    return out, (q, k, v, reading, out, lse)


def _backward(scale: float, block: int, saved: tuple, grad: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, reading, out, lse = saved
    meet = may_meet(reading, block, block).any(0)
    inner = (out.astype(jnp.float32) * grad).sum(-1, keepdims=True)
    lse = lse[..., None]

    def of_queries(total: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        mine, grads, ends, inners = (_cut(a, i, block) for a in (q, grad, lse, inner))

        def of_keys(j: Array, carry: tuple) -> tuple:
            dq, dk, dv = carry
            there, values = _cut(k, j, block), _cut(v, j, block)
            weights = jnp.exp(_scores(mine, there, reading, i, j, scale) - ends)
            d_weights = jnp.einsum("bkgqw,bksw->bkgqs", grads, values, preferred_element_type=jnp.float32)
            d_scores = (weights * (d_weights - inners) * scale).astype(q.dtype)

            def add(to: Array, product: str, *of: Array) -> Array:
                new = jnp.einsum(product, *of, preferred_element_type=jnp.float32)
                return jax.lax.dynamic_update_slice_in_dim(to, _cut(to, j, block) + new, j * block, axis=2)

            dq += jnp.einsum("bkgqs,bksh->bkgqh", d_scores, there, preferred_element_type=jnp.float32)
            dk = add(dk, "bkgqs,bkgqh->bksh", d_scores, mine)
            return dq, dk, add(dv, "bkgqs,bkgqw->bksw", weights.astype(v.dtype), grads)

        def step(j: Array, carry: tuple) -> tuple:
            return jax.lax.cond(meet[i, j], lambda c: of_keys(j, c), lambda c: c, carry)

        dq, dk, dv = jax.lax.fori_loop(0, meet.shape[1], step, (jnp.zeros(mine.shape), *total))
        return (dk, dv), dq.astype(q.dtype)

    zero = tuple(jnp.zeros(a.shape, jnp.float32) for a in (k, v))
    (dk, dv), dq = jax.lax.scan(of_queries, zero, jnp.arange(meet.shape[0]))
    return jnp.moveaxis(dq, 0, 3).reshape(q.shape), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward, _backward)
