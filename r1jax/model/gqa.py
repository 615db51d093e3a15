"""Grouped-query attention (arXiv 2305.13245) as in Qwen 2/2.5/3 and Llama 3: optional qkv bias, optional q/k norm."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from r1jax.model import long_rows
from r1jax.model.config import ModelConfig
from r1jax.model.layers import (
    Mask,
    attend,
    attend_cache,
    ones,
    rms_norm,
    rope_angles,
    rotate,
    weight,
    write_cache,
    zeros,
)
from r1jax.model.long_rows import Source
from r1jax.model.quantize import product
from r1jax.sharding import constrain

Cache = dict[str, Array]  # k, v: [L, B, K, S, h]


class Gqa(nnx.Module):
    """Weights of `layers` stacked attention layers."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig, layers: int, dtype: DTypeLike) -> None:
        c, s = config, config.initializer_range
        d, heads, kv, h = c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q = weight(rngs, (layers, d, heads, h), ("layers", "width", "heads", None), s, dtype)
        self.k = weight(rngs, (layers, d, kv, h), ("layers", "width", "kv_heads", None), s, dtype)
        self.v = weight(rngs, (layers, d, kv, h), ("layers", "width", "kv_heads", None), s, dtype)
        self.o = weight(rngs, (layers, heads, h, d), ("layers", "heads", None, "width"), s, dtype)
        if c.qkv_bias:
            self.q_bias = zeros((layers, heads, h), ("layers", "heads", None), dtype)
            self.k_bias = zeros((layers, kv, h), ("layers", "kv_heads", None), dtype)
            self.v_bias = zeros((layers, kv, h), ("layers", "kv_heads", None), dtype)
        if c.qk_norm:
            self.q_norm = ones((layers, h), ("layers", None), dtype)
            self.k_norm = ones((layers, h), ("layers", None), dtype)


def _project(
    p: dict, config: ModelConfig, x: Float[Array, "*n D"], positions: Int[Array, "*n"]
) -> tuple[Float[Array, "*n H h"], Float[Array, "*n K h"], Float[Array, "*n K h"]]:
    q, k, v = (product("...d,dkh->...kh", x, p[name]) for name in "qkv")
    if config.qkv_bias:
        q, k, v = q + p["q_bias"], k + p["k_bias"], v + p["v_bias"]
    if config.qk_norm:
        q, k = rms_norm(q, p["q_norm"], config.rms_norm_eps), rms_norm(k, p["k_norm"], config.rms_norm_eps)
    cos, sin = rope_angles(config.rope, config.head_dim, positions)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def attention(
    p: dict, config: ModelConfig, x: Float[Array, "B T D"], positions: Int[Array, "B T"], mask: Mask
) -> tuple[Float[Array, "B T D"], Cache]:
    """One layer over whole rows; also returns what the cache keeps of each token, [B, K, T, h]."""
    q, k, v = _project(p, config, x, positions)
    b, t, heads, h = q.shape
    q = constrain(q, "rows", "tokens", "heads", None)
    grouped = q.reshape(b, t, config.num_key_value_heads, -1, h)
    if mask.whole is None:
        axes = (("rows", "tokens", "kv_heads", None),) * 2
        out = long_rows.attend(grouped, Source((k, v), axes, (), (), lambda k, v: (k, v)), mask, h**-0.5)
    else:
        out = attend(grouped, k, v, mask.whole, h**-0.5)
    out = out.reshape(b, t, heads, h)
    return product("bthd,hdw->btw", out, p["o"]), {"k": k.swapaxes(1, 2), "v": v.swapaxes(1, 2)}


def decode(
    p: dict,
    config: ModelConfig,
    x: Float[Array, "B D"],
    cache: Cache,
    positions: Int[Array, "B"],
    lengths: Int[Array, "B"],
    path: str = "plain",
) -> tuple[Float[Array, "B D"], Cache]:
    """One new token per slot: writes its key and value at `positions` and reads the first `lengths` of the cache."""
    assert path == "plain"
    q, k, v = _project(p, config, x, positions)
    keys, values = (write_cache(cache[name], new, positions, LENGTH_AXIS) for name, new in (("k", k), ("v", v)))
    b, heads, h = q.shape
    kv = config.num_key_value_heads
    scores = jnp.einsum("bkgh,bksh->bkgs", q.reshape(b, kv, -1, h), keys, preferred_element_type=jnp.float32)
    weights = attend_cache(scores.reshape(b, heads, -1), lengths, h**-0.5, values.dtype)
    out = jnp.einsum("bkgs,bksh->bkgh", weights.reshape(b, kv, heads // kv, -1), values).reshape(b, heads, h)
    return product("bhd,hdw->bw", out.astype(x.dtype), p["o"]), {"k": keys, "v": values}


def empty_cache(config: ModelConfig, slots: int, length: int, dtype: DTypeLike) -> Cache:
    """Zeros [B, K, S, h] for keys and values."""
    shape = (slots, config.num_key_value_heads, length, config.head_dim)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


LENGTH_AXIS = 2  # of the cache arrays
CACHE_AXES = dict.fromkeys("kv", ("rows", "kv_heads", None, None))
