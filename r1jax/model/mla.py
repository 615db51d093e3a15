"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; V3, 2412.19437, section 2.1.1).

Training expands keys and values from the latent. Decoding absorbs the expansion into query and output instead, so that
the cache holds one latent and one rotary key per token: 576 values for DeepSeek-V3, not 32,768.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from r1jax import sharding
from r1jax.model import long_rows
from r1jax.model.config import ModelConfig
from r1jax.model.layers import (
    Mask,
    attend,
    attend_cache,
    ones,
    pad_last,
    rms_norm,
    rope_angles,
    rotate,
    weight,
    write_cache,
    yarn_mscale,
)
from r1jax.model.long_rows import Source
from r1jax.model.quantize import dequantize, product
from r1jax.sharding import constrain

Cache = dict[str, Array]  # of a layer: latent [B, S, c + r], the normalised latent, then the rotated key


class Mla(nnx.Module):
    """Weights of `layers` stacked attention layers."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig, layers: int, dtype: DTypeLike) -> None:
        c, s = config, config.initializer_range
        d, heads, rank = c.hidden_size, c.num_attention_heads, c.kv_lora_rank
        head = c.qk_nope_head_dim + c.qk_rope_head_dim
        if c.q_lora_rank is None:
            self.q = weight(rngs, (layers, d, heads, head), ("layers", "width", "heads", None), s, dtype)
        else:
            self.q_a = weight(rngs, (layers, d, c.q_lora_rank), ("layers", "width", None), s, dtype)
            self.q_a_norm = ones((layers, c.q_lora_rank), ("layers", None), dtype)
            self.q_b = weight(rngs, (layers, c.q_lora_rank, heads, head), ("layers", None, "heads", None), s, dtype)
        self.kv_a = weight(rngs, (layers, d, rank + c.qk_rope_head_dim), ("layers", "width", None), s, dtype)
        self.kv_a_norm = ones((layers, rank), ("layers", None), dtype)
        self.k_b = weight(rngs, (layers, rank, heads, c.qk_nope_head_dim), ("layers", None, "heads", None), s, dtype)
        self.v_b = weight(rngs, (layers, rank, heads, c.v_head_dim), ("layers", None, "heads", None), s, dtype)
        self.o = weight(rngs, (layers, heads, c.v_head_dim, d), ("layers", "heads", None, "width"), s, dtype)


def softmax_scale(config: ModelConfig) -> float:
    """1/sqrt(head width), times YaRN's temperature squared where the context was extended."""
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    if config.rope.kind != "default" and config.rope.mscale_all_dim:
        scale *= yarn_mscale(config.rope.factor, config.rope.mscale_all_dim) ** 2
    return scale


def narrow(x: Array) -> Array:
    """A low-rank projection of whole rows: made where the tokens lie between layers, and only then gathered."""
    return constrain(constrain(x, "rows", "residual", None), "rows", "tokens", None) if x.ndim == 3 else x


def _queries(
    p: dict, config: ModelConfig, x: Float[Array, "*n D"], cos: Float[Array, "*n half"], sin: Float[Array, "*n half"]
) -> tuple[Float[Array, "*n H nope"], Float[Array, "*n H rope"]]:
    if config.q_lora_rank is None:
        q = product("...d,dhe->...he", x, p["q"])
    else:
        low = narrow(rms_norm(product("...d,dr->...r", x, p["q_a"]), p["q_a_norm"], config.rms_norm_eps))
        q = product("...d,dhe->...he", low, p["q_b"])
    nope, rope = jnp.split(q, [config.qk_nope_head_dim], axis=-1)
    return nope, rotate(rope, cos, sin)


def _latent(
    p: dict, config: ModelConfig, x: Float[Array, "*n D"], cos: Float[Array, "*n half"], sin: Float[Array, "*n half"]
) -> tuple[Float[Array, "*n c"], Float[Array, "*n rope"]]:
    latent, rope = jnp.split(narrow(product("...d,dr->...r", x, p["kv_a"])), [config.kv_lora_rank], axis=-1)
    return rms_norm(latent, p["kv_a_norm"], config.rms_norm_eps), rotate(rope[..., None, :], cos, sin)[..., 0, :]


def attention(
    p: dict, config: ModelConfig, x: Float[Array, "B T D"], positions: Int[Array, "B T"], mask: Mask
) -> tuple[Float[Array, "B T D"], Cache]:
    """One layer over whole rows, expanded; also returns what the cache keeps of each token, [B, T, c + r]."""
    cos, sin = rope_angles(config.rope, config.qk_rope_head_dim, positions)
    q_nope, q_rope = _queries(p, config, x, cos, sin)
    latent, k_rope = _latent(p, config, x, cos, sin)
    q = constrain(jnp.concatenate([q_nope, q_rope], -1), "rows", "tokens", "heads", None)[:, :, :, None]
    # Once per row of many tokens, so that their conversion counts for nothing.
    weights = tuple(dequantize(p[name], x.dtype) for name in ("k_b", "v_b"))
    if mask.whole is None:
        # What travels between devices is the latent, not the keys and values of all heads.
        kept = latent, k_rope
        axes = ("rows", "tokens", None), ("rows", "tokens", None)
        lies = (None, "heads", None), (None, "heads", None)
        out = long_rows.attend(q, Source(kept, axes, weights, lies, _expand), mask, softmax_scale(config))
    else:
        out = attend(q, *_expand(latent, k_rope, *weights), mask.whole, softmax_scale(config))
    out = product("bthv,hvd->btd", out[:, :, :, 0], p["o"])
    return out, {"latent": jnp.concatenate([latent, k_rope], -1)}


def _expand(
    latent: Float[Array, "B T c"],
    k_rope: Float[Array, "B T rope"],
    k_b: Float[Array, "c H nope"],
    v_b: Float[Array, "c H v"],
) -> tuple[Float[Array, "B T H k"], Float[Array, "B T H v"]]:
    """Keys and values of all heads."""
    k_nope = jnp.einsum("btc,chn->bthn", latent, k_b)
    v = jnp.einsum("btc,chv->bthv", latent, v_b)
    shared = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:-1], k_rope.shape[-1]))
    return jnp.concatenate([k_nope, shared], -1), v


def decode(
    p: dict,
    config: ModelConfig,
    x: Float[Array, "B D"],
    cache: Cache,
    positions: Int[Array, "B"],
    lengths: Int[Array, "B"],
    path: str = "plain",
) -> tuple[Float[Array, "B D"], Cache]:
    """One new token per slot, absorbed: queries go into latent space, the latent cache serves as keys and values."""
    cos, sin = rope_angles(config.rope, config.qk_rope_head_dim, positions)
    q_nope, q_rope = _queries(p, config, x, cos, sin)
    new = jnp.concatenate(_latent(p, config, x, cos, sin), -1)
    q = jnp.concatenate([product("bhn,chn->bhc", q_nope, p["k_b"]), q_rope], -1)
    q, new = (pad_last(a, cache["latent"].shape[-1]) for a in (q, new))
    stored = write_cache(cache["latent"], new, positions, LENGTH_AXIS)
    # A device has some heads of its rows' queries and needs all heads of its own slots'; what is read goes back.
    q = constrain(constrain(q, "rows", "heads", None), "slots", None, None)
    read = READ[path](q, stored, lengths, config.kv_lora_rank, softmax_scale(config)).astype(x.dtype)
    read = constrain(constrain(read, "slots", None, None), "rows", "heads", None)
    out = product("bhc,chv->bhv", read, p["v_b"])
    return product("bhv,hvd->bd", out, p["o"]), {"latent": stored}


def read_plain(
    q: Float[Array, "B H w"], stored: Float[Array, "B S w"], lengths: Int[Array, "B"], rank: int, scale: float
) -> Float[Array, "B H c"]:
    """Attention in latent space over the first `lengths` cached rows; zero where a slot is empty."""
    # Cache positions outermost, and the exchange kept apart: else the CPU's batched product runs three times slower.
    scores = jnp.einsum("bsc,bhc->bsh", stored, q, preferred_element_type=jnp.float32)
    scores = jax.lax.optimization_barrier(scores).swapaxes(1, 2)
    weights = attend_cache(scores, lengths, scale, stored.dtype)
    read = jnp.einsum("bhs,bsc->bhc", weights, stored)[..., :rank]
    return jnp.where((lengths > 0)[:, None, None], read, 0)


def read_kernel(
    q: Float[Array, "B H w"], stored: Float[Array, "B S w"], lengths: Int[Array, "B"], rank: int, scale: float
) -> Float[Array, "B H c"]:
    """The same by the TPU kernel, each device for its own slots; interpreted where there is no TPU."""
    from r1jax.model.kernels.mla_decode import mla_decode  # here, since Pallas takes a second to import

    interpret = sharding.platform() != "tpu"
    run = partial(mla_decode, rank=rank, scale=scale, interpret=interpret)
    layout = sharding.current()
    if layout is not None:
        here = layout.spec(("slots",))
        run = jax.shard_map(run, mesh=layout.mesh, in_specs=(here,) * 3, out_specs=here, check_vma=False)
    return run(q.astype(stored.dtype), stored, lengths)


READ = {"plain": read_plain, "kernel": read_kernel}


def empty_cache(config: ModelConfig, slots: int, length: int, dtype: DTypeLike) -> Cache:
    """Zeros [B, S, c + r]."""
    return {"latent": jnp.zeros((slots, length, config.cache_width), dtype)}


LENGTH_AXIS = 1  # of the cache array
CACHE_AXES = {"latent": ("slots", None, None)}
