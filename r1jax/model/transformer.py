"""The decoder: declared once, run over whole rows (training, scoring, prefill) or one token per slot (decoding).

Layers of one kind are stacked and scanned: for DeepSeek-V3 3 dense and 58 mixture layers (arXiv 2412.19437).
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from r1jax.model import gqa, mla, vocabulary
from r1jax.model.blockwise import ATTENDED
from r1jax.model.config import DEFAULT_PATHS, ModelConfig, Paths
from r1jax.model.experts import ROUTED
from r1jax.model.layers import Mask, Mlp, attention_mask, mlp, ones, rms_norm, rows, weight
from r1jax.model.lora import of_layer
from r1jax.model.moe import Moe, expert_load, moe
from r1jax.sharding import constrain
from r1jax.types import Params

ATTENTION = {"mla": mla, "gqa": gqa}
DECLARE_ATTENTION = {"mla": mla.Mla, "gqa": gqa.Gqa}

STACKS = "dense", "moe"  # of layers of one kind, in their order

# What the backward pass may keep of a layer; the rest is computed again.
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # What attention read and what it gave: a few numbers a token, which cost the most where rows are long.
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENDED),
    # Also the routed experts' first products and what came from other devices to them (if not by "gather", which brings
    # everything), so that tokens travel there once.
    "experts": jax.checkpoint_policies.save_only_these_names(ATTENDED, ROUTED),
}


class Layers(nnx.Module):
    """Weights of `layers` stacked layers of one kind."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig, layers: int, routed: bool, dtype: DTypeLike) -> None:
        d = config.hidden_size
        self.attn_norm = ones((layers, d), ("layers", None), dtype)
        self.attn = DECLARE_ATTENTION[config.attention](rngs, config, layers, dtype)
        self.mlp_norm = ones((layers, d), ("layers", None), dtype)
        if routed:
            self.mlp = Moe(rngs, config, layers, dtype)
        else:
            self.mlp = Mlp(rngs, config, layers, config.intermediate_size, dtype)


class NextToken(nnx.Module):
    """One multi-token-prediction module (DeepSeek-V3, section 2.2); embedding and head are the main model's."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig, dtype: DTypeLike) -> None:
        d = config.hidden_size
        self.hidden_norm = ones((d,), (None,), dtype)
        self.embed_norm = ones((d,), (None,), dtype)
        self.proj = weight(rngs, (2 * d, d), (None, "width"), config.initializer_range, dtype)
        self.layer = Layers(rngs, config, 1, config.n_routed_experts > 0, dtype)
        self.norm = ones((d,), (None,), dtype)


class Transformer(nnx.Module):
    """All weights of a decoder."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig, dtype: DTypeLike) -> None:
        v, d = config.vocab_size, config.hidden_size
        self.embed = weight(rngs, (v, d), ("vocab", "width"), config.initializer_range, dtype)
        if config.n_dense:
            self.dense = Layers(rngs, config, config.n_dense, False, dtype)
        if config.n_moe:
            self.moe = Layers(rngs, config, config.n_moe, True, dtype)
        self.norm = ones((d,), (None,), dtype)
        if not config.tie_word_embeddings:
            self.head = weight(rngs, (d, v), ("width", "vocab"), config.initializer_range, dtype)
        if config.num_nextn_predict_layers:
            self.mtp = NextToken(rngs, config, dtype)


def init(config: ModelConfig, key: Array, dtype: DTypeLike = jnp.float32) -> Params:
    """Random weights as nested dicts of arrays."""
    return nnx.to_pure_dict(nnx.state(Transformer(nnx.Rngs(key), config, dtype), nnx.Param))


def shapes(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> Params:
    """Shape and dtype of every weight, without computing any."""
    return jax.eval_shape(partial(init, config, dtype=dtype), jax.random.key(0))


def logical_axes(config: ModelConfig) -> Params:
    """Logical axes of every weight: tuples of names as leaves."""
    model = nnx.eval_shape(lambda: Transformer(nnx.Rngs(0), config, jnp.float32))
    state = nnx.state(model, nnx.Param)
    return nnx.to_pure_dict(
        jax.tree.map(lambda p: p.get_metadata("axes"), state, is_leaf=lambda p: isinstance(p, nnx.Param))
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hidden:
    """What a pass over whole rows gives.

    x [B, T, D] after the final norm; load [L, E] assignments per expert; experts [L, B, T, K] chosen; cache of every
    token, per stack a list of its layers'. The last three are None where they do not exist or were not asked for.
    """

    x: Array
    load: Array | None
    experts: Array | None
    cache: dict | None


def _layer(
    p: Params, config: ModelConfig, x: Array, positions: Array, mask: Mask, replay: Array | None, paths: Paths
) -> tuple[Array, dict, Array | None]:
    a, kept = ATTENTION[config.attention].attention(
        p["attn"], config, rms_norm(x, p["attn_norm"], config.rms_norm_eps), positions, mask
    )
    x = checkpoint_name(rows(x + a), ATTENDED)
    h = rms_norm(x, p["mlp_norm"], config.rms_norm_eps)
    y, ids = moe(p["mlp"], config, h, replay, paths) if "router" in p["mlp"] else (mlp(p["mlp"], h), None)
    return rows(x + y), kept, ids


def _stack(
    stack: Params,
    config: ModelConfig,
    x: Array,
    positions: Array,
    mask: Mask,
    counted: Array,
    replay: Array | None,
    keep: tuple[str, ...],
    remat: str,
    unroll: int,
    paths: Paths,
) -> tuple[Array, dict]:
    def body(x: Array, layer: tuple) -> tuple[Array, dict]:
        p, replay = layer
        x, cache, ids = _layer(of_layer(p), config, x, positions, mask, replay, paths)
        out = {"cache": cache, "experts": ids}
        if ids is not None:
            out["load"] = expert_load(ids, counted, config.n_routed_experts)
        return x, {name: out[name] for name in keep if out.get(name) is not None}

    if REMAT[remat] is not None:
        body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)
    return jax.lax.scan(body, x, (stack, replay), unroll=unroll)


def _by_layer(stacked: dict) -> list[dict]:
    n = len(jax.tree.leaves(stacked)[0])
    return [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(n)]


def hidden(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    parents: Int[Array, "B T"] | None = None,
    replay: Int[Array, "L B T K"] | None = None,
    keep: tuple[str, ...] = ("load",),
    remat: str = "none",
    unroll: int = 1,
    paths: Paths = DEFAULT_PATHS,
) -> Hidden:
    """A pass over packed rows.

    Args:
        segments: 0 is padding; a token reads its own segment, up to itself, and its parent segment.
        replay: experts to use in the mixture layers, -1 for the router's own choice.
        keep: what to return of each layer besides x: "load", "experts", "cache".
        remat: a key of REMAT.
        unroll: layers per step of the scan.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
    segments = jnp.ones_like(tokens) if segments is None else segments
    mask = attention_mask(segments, segments if parents is None else parents, paths.attention)
    x = rows(params["embed"][tokens])
    outs = {}
    for name in STACKS:
        if name in params:
            given = replay if name == "moe" else None
            x, outs[name] = _stack(
                params[name], config, x, positions, mask, segments > 0, given, keep, remat, unroll, paths
            )
    routed = outs.get("moe", {})
    return Hidden(
        x=rms_norm(x, params["norm"], config.rms_norm_eps),
        load=routed.get("load"),
        experts=routed.get("experts"),
        cache={name: _by_layer(out["cache"]) for name, out in outs.items()} if "cache" in keep else None,
    )


def _head(params: Params) -> Float[Array, "D V"]:
    return params["embed"].T if "head" not in params else params["head"]


def logits(params: Params, x: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
    """Float32 logits of normalised hidden states."""
    out = jnp.matmul(x, _head(params), preferred_element_type=jnp.float32)
    return constrain(out, "rows", *("tokens",) * (out.ndim == 3), "vocab")


def forward(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    segments: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T V"]:
    """Logits of every position, float32. Training never calls this: see `token_logps`."""
    return logits(params, hidden(params, config, tokens, positions, segments).x)


def token_logps(
    params: Params, x: Float[Array, "B T D"], targets: Int[Array, "B T"], temperature: float = 1.0
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability of each target and entropy (no gradient), in nats, without all logits in memory at once.

    Sampling at another temperature than 1 makes another policy; log-probabilities are those of that policy.
    """
    return vocabulary.token_logps(_head(params), x, targets, temperature)


def next_token_hidden(
    params: Params,
    config: ModelConfig,
    x: Float[Array, "B T D"],
    following: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    paths: Paths = DEFAULT_PATHS,
) -> tuple[Float[Array, "B T D"], Float[Array, "L E"] | None]:
    """Hidden states that predict the token after `following` (DeepSeek-V3, equations 21 to 23), and expert loads."""
    p, eps = params["mtp"], config.rms_norm_eps
    both = [rms_norm(params["embed"][following], p["embed_norm"], eps), rms_norm(x, p["hidden_norm"], eps)]
    x = jnp.concatenate(both, -1) @ p["proj"]
    mask = attention_mask(segments, segments, paths.attention)
    x, out = _stack(p["layer"], config, x, positions, mask, segments > 0, None, ("load",), "none", 1, paths)
    return rms_norm(x, p["norm"], eps), out.get("load")


def layers_apart(params: Params) -> Params:
    """The weights with a list of its layers for each stack.

    Taken apart before a loop over tokens: within it, each step would copy what a kernel reads out of its stack.
    """
    return {name: _by_layer(p) if name in STACKS else p for name, p in params.items()}


def decode_step(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "B"],
    cache: dict,
    positions: Int[Array, "B"],
    live: Bool[Array, "B"] | None = None,
    path: str = "plain",
    paths: Paths = DEFAULT_PATHS,
) -> tuple[Float[Array, "B D"], dict, Int[Array, "L B K"] | None]:
    """One token per slot: hidden states after the final norm, the cache with these tokens in it, the experts chosen.

    Layers are unrolled and each has a cache of its own, updated in place: stacked, it would be copied every step.

    Args:
        params: with the layers apart, as `layers_apart` gives them.
        live: slots whose result is wanted; the others read nothing of their cache.
        path: how the cache is read, a key of mla.READ.
    """
    lengths = positions + 1 if live is None else jnp.where(live, positions + 1, 0)
    attention = ATTENTION[config.attention]
    x = constrain(params["embed"][tokens], "rows", None)
    chosen = []
    cache = {name: list(layers) for name, layers in cache.items()}
    for name in STACKS:
        for layer, p in enumerate(params.get(name, ())):
            h = rms_norm(x, p["attn_norm"], config.rms_norm_eps)
            a, cache[name][layer] = attention.decode(p["attn"], config, h, cache[name][layer], positions, lengths, path)
            x = x + a
            h = rms_norm(x, p["mlp_norm"], config.rms_norm_eps)
            if "router" in p["mlp"]:
                y, ids = moe(p["mlp"], config, h[:, None], None, paths, ("slots", None))
                x, chosen = x + constrain(y[:, 0], "rows", None), [*chosen, ids[:, 0]]
            else:
                x = x + mlp(p["mlp"], h)
    return rms_norm(x, params["norm"], config.rms_norm_eps), cache, jnp.stack(chosen) if chosen else None


def empty_cache(config: ModelConfig, slots: int, length: int, dtype: DTypeLike = jnp.float32) -> dict:
    """A cache of zeros: for each stack a list of its layers'."""
    make = ATTENTION[config.attention].empty_cache
    layers = {"dense": config.n_dense, "moe": config.n_moe}
    return {name: [make(config, slots, length, dtype) for _ in range(n)] for name, n in layers.items() if n}
