"""What every layer is made of: declared parameters, RMSNorm, rotary embedding, SwiGLU, masked attention.

Modules declare shapes and logical axes (Flax NNX); functions compute on the plain arrays. Sources: RMSNorm arXiv
1910.07467, SwiGLU 2002.05202, RoPE 2104.09864, YaRN 2309.00071, Llama 3's frequency scaling from its released code.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from r1jax.model.config import ModelConfig, Rope
from r1jax.model.quantize import Matrix, Quantized, product
from r1jax.sharding import constrain, current, platform


def weight(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], scale: float, dtype: DTypeLike
) -> nnx.Param:
    """A weight drawn from a normal distribution with its logical axes beside its shape."""
    assert len(shape) == len(axes)
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape, dtype), axes=axes)


def ones(shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: DTypeLike) -> nnx.Param:
    """A norm's gain."""
    return nnx.Param(jnp.ones(shape, dtype), axes=axes)


def zeros(shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: DTypeLike) -> nnx.Param:
    """A bias."""
    return nnx.Param(jnp.zeros(shape, dtype), axes=axes)


def linear(x: Float[Array, "*n D"], w: Matrix) -> Float[Array, "*n F"]:
    """x @ w."""
    return product("...d,df->...f", x, w) if isinstance(w, Quantized) else _linear(x, w)


@jax.custom_vjp
def _linear(x: Float[Array, "*n D"], w: Float[Array, "D F"]) -> Float[Array, "*n F"]:
    """x @ w; the gradient of w is formed with the narrower of its two factors transposed.

    A CPU copies the transposed factor element by element: with the wrong one that is a quarter of a training step.
    """
    return x @ w


def _linear_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ w, (x, w)


def _linear_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, w = saved
    flat, wide = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    dw = flat.T @ wide if w.shape[0] <= w.shape[1] else (wide.T @ flat).T
    return grad @ w.T, dw


_linear.defvjp(_linear_forward, _linear_backward)


class Mlp(nnx.Module):
    """SwiGLU weights of `layers` stacked layers."""

    def __init__(
        self, rngs: nnx.Rngs, config: ModelConfig, layers: int, width: int, dtype: DTypeLike, axis: str = "mlp"
    ) -> None:
        d, s = config.hidden_size, config.initializer_range
        self.gate = weight(rngs, (layers, d, width), ("layers", "width", axis), s, dtype)
        self.up = weight(rngs, (layers, d, width), ("layers", "width", axis), s, dtype)
        self.down = weight(rngs, (layers, width, d), ("layers", axis, "width"), s, dtype)


def mlp(p: dict, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
    """SwiGLU: down(silu(gate x) * up x)."""
    return linear(jax.nn.silu(linear(x, p["gate"])) * linear(x, p["up"]), p["down"])


def rms_norm(x: Float[Array, "*n d"], gain: Float[Array, "d"], eps: float) -> Float[Array, "*n d"]:
    """Root-mean-square norm, computed in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * gain


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's attention temperature (section 3.4, as in DeepSeek's released code)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_frequencies(rope: Rope, dim: int) -> tuple[Float[Array, "half"], float]:
    """Inverse wavelengths [dim/2] in radians per position, and the factor on cos and sin."""
    inv = rope.theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    if rope.kind == "default":
        return inv, 1.0
    if rope.kind == "linear":
        return inv / rope.factor, 1.0
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / inv
        low, high = (rope.original_max_position_embeddings / f for f in (rope.low_freq_factor, rope.high_freq_factor))
        smooth = (rope.original_max_position_embeddings / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        middle = (1 - smooth) * inv / rope.factor + smooth * inv
        return jnp.where(wavelength > low, inv / rope.factor, jnp.where(wavelength < high, inv, middle)), 1.0

    def correction(rotations: float) -> float:
        span = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(span) / (2 * math.log(rope.theta))

    low, high = correction(rope.beta_fast), correction(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = jnp.clip((jnp.arange(dim // 2, dtype=jnp.float32) - low) / max(high - low, 0.001), 0, 1)
    scaled = inv / rope.factor * ramp + inv * (1 - ramp)
    if rope.attention_factor is not None:
        return scaled, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scaled, yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return scaled, yarn_mscale(rope.factor)


def rope_angles(
    rope: Rope, dim: int, positions: Int[Array, "*n"]
) -> tuple[Float[Array, "*n half"], Float[Array, "*n half"]]:
    """cos and sin for the given positions, float32."""
    inv, factor = rope_frequencies(rope, dim)
    angle = positions[..., None].astype(jnp.float32) * inv
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(
    x: Float[Array, "*n heads dim"], cos: Float[Array, "*n half"], sin: Float[Array, "*n half"]
) -> Float[Array, "*n heads dim"]:
    """Rotary embedding, half-split pairs (i, i + dim/2)."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Mask:
    """Query t may read key s: s <= t, and s lies in t's own segment or in its parent, its prompt's.

    `whole` says so for every pair; without it attention works through blocks of the row (model/long_rows.py).
    """

    segments: Int[Array, "B T"]
    parents: Int[Array, "B T"]
    path: str
    whole: Bool[Array, "B T T"] | None


# Longest row whose scores are taken all at once where nothing else is asked for: 16 MB a head.
WHOLE_TOKENS = 2048


def attention_mask(segments: Int[Array, "B T"], parents: Int[Array, "B T"], path: str = "auto") -> Mask:
    """Who may read whom; `path` is one of Paths.attention.

    Taken by "auto": on TPU the kernel, elsewhere blocks for rows that are long or split over devices.
    """
    layout, tokens = current(), segments.shape[1]
    if path == "auto":
        is_split = layout is not None and layout.size("tokens") > 1
        path = "kernel" if platform() == "tpu" else "blocks" if is_split or tokens > WHOLE_TOKENS else "whole"
    if path != "whole":
        return Mask(segments, parents, path, None)
    causal = jnp.tril(jnp.ones((tokens,) * 2, bool))
    keys = segments[:, None, :]
    return Mask(segments, parents, path, causal & ((segments[:, :, None] == keys) | (parents[:, :, None] == keys)))


# Queries are taken in at most this many blocks, each of which reads only the keys up to its own end: for causal rows
# that leaves out almost half of the scores.
QUERY_BLOCKS = 4


def attend(
    q: Float[Array, "B T K g h"],
    k: Float[Array, "B T K h"],
    v: Float[Array, "B T K w"],
    mask: Bool[Array, "B T T"],
    scale: float,
) -> Float[Array, "B T K g w"]:
    """Causal softmax attention with g query heads per key head; scores and softmax in float32."""
    b, t, kv, g, _ = q.shape
    size = max(32, -(-t // QUERY_BLOCKS))
    # Heads before tokens, and a key head's queries as the rows of one matrix: a CPU works off plain batches of matrices
    # twice as fast.
    q, k, v = q.transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2)
    out = []
    for start in range(0, t, size):
        end = min(start + size, t)
        queries = q[..., start:end, :].reshape(b, kv, g * (end - start), -1)
        seen = jnp.tile(mask[:, start:end, :end], (1, g, 1))
        block = _attend_block(queries, k[:, :, :end], v[:, :, :end], seen, scale)
        out.append(block.reshape(b, kv, g, end - start, -1))
    return jnp.concatenate(out, axis=3).transpose(0, 3, 1, 2, 4)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend_block(
    q: Float[Array, "B K r h"],
    k: Float[Array, "B K s h"],
    v: Float[Array, "B K s w"],
    mask: Bool[Array, "B r s"],
    scale: float,
) -> Float[Array, "B K r w"]:
    return _attend_forward(q, k, v, mask, scale)[0]


def _attend_forward(q: Array, k: Array, v: Array, mask: Array, scale: float) -> tuple[Array, tuple]:
    scores = jnp.einsum("bkrh,bksh->bkrs", q, k, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1).astype(v.dtype)
    out = jnp.einsum("bkrs,bksw->bkrw", weights, v)
    return out, (q, k, v, weights, out)


def _attend_backward(scale: float, saved: tuple, grad: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, weights, out = saved
    # sum_s weights * d(weights) is sum_w out * grad (FlashAttention, arXiv 2205.14135, appendix B.2): no sum over keys.
    inner = (out.astype(jnp.float32) * grad).sum(-1, keepdims=True)
    d_weights = jnp.einsum("bkrw,bksw->bkrs", grad, v, preferred_element_type=jnp.float32)
    d_scores = (weights * (d_weights - inner) * scale).astype(q.dtype)
    return (
        jnp.einsum("bkrs,bksh->bkrh", d_scores, k),
        jnp.einsum("bkrs,bkrh->bksh", d_scores, q),
        jnp.einsum("bkrs,bkrw->bksw", weights, grad),
        None,
    )


_attend_block.defvjp(_attend_forward, _attend_backward)


def write_cache(
    cache: Float[Array, "B *n"], new: Float[Array, "B *m"], positions: Int[Array, "B"], axis: int
) -> Float[Array, "B *n"]:
    """Each slot's entry of one new token at its own position, which counts along `axis` (the slots' is 0)."""

    def one(cache: Array, new: Array, position: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(cache, new, position, axis - 1)

    # Mapped over slots and not indexed by them: so the partitioner sees that no device needs another's.
    return jax.vmap(one)(cache, new.astype(cache.dtype), positions)


def pad_last(x: Float[Array, "*n d"], width: int) -> Float[Array, "*n w"]:
    """Zeros behind the last axis, up to `width`."""
    missing = width - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def attend_cache(
    scores: Float[Array, "B heads S"], lengths: Int[Array, "B"], scale: float, dtype: DTypeLike
) -> Float[Array, "B heads S"]:
    """Attention weights of one new token per slot over the first `lengths` cache positions."""
    live = jnp.arange(scores.shape[-1]) < lengths[:, None]
    scores = jnp.where(live[:, None], scores.astype(jnp.float32) * scale, -1e30)
    return jax.nn.softmax(scores, axis=-1).astype(dtype)


def rows(x: Array) -> Array:
    """Activations [B, T, ...] as they lie between layers."""
    return constrain(x, "rows", "residual", *(None,) * (x.ndim - 2))
