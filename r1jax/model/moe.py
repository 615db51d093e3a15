"""DeepSeekMoE (arXiv 2401.06066; V3, 2412.19437, section 2.1.2): sigmoid router with a bias that only selects,
group-limited top-k, normalised and scaled gates, shared experts, dropless dispatch (experts.py, exchange.py).
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from r1jax import sharding
from r1jax.model.config import DEFAULT_PATHS, ModelConfig, Paths
from r1jax.model.exchange import experts_apart
from r1jax.model.experts import experts_local
from r1jax.model.layers import Mlp, mlp, weight, zeros

Axes = tuple[str, ...]  # of the mesh
EXPERTS = "gate", "up", "down"  # weights of the routed experts


class Moe(nnx.Module):
    """Weights of `layers` stacked mixture layers; the router is float32 whatever the rest is."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig, layers: int, dtype: DTypeLike) -> None:
        c, s = config, config.initializer_range
        e, d, f = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
        self.router = weight(rngs, (layers, d, e), ("layers", "width", None), s, jnp.float32)
        if c.router_bias:
            self.router_bias = zeros((layers, e), ("layers", None), jnp.float32)
        self.gate = weight(rngs, (layers, e, d, f), ("layers", "experts", "expert_width", None), s, dtype)
        self.up = weight(rngs, (layers, e, d, f), ("layers", "experts", "expert_width", None), s, dtype)
        self.down = weight(rngs, (layers, e, f, d), ("layers", "experts", None, "expert_width"), s, dtype)
        if c.n_shared_experts:
            self.shared = Mlp(rngs, c, layers, c.n_shared_experts * f, dtype, "shared_mlp")


def route(
    p: dict, config: ModelConfig, x: Float[Array, "*n D"], replay: Int[Array, "*n K"] | None = None
) -> tuple[Int[Array, "*n K"], Float[Array, "*n K"]]:
    """Experts and gates of each token.

    Args:
        replay: experts recorded by the sampler, used where they are not negative; the gates are always computed here.
    """
    logits = x.astype(jnp.float32) @ p["router"]
    scores = jax.nn.sigmoid(logits) if config.scoring_func == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    choice = jax.lax.stop_gradient(scores + p["router_bias"] if config.router_bias else scores)
    if config.n_group > 1:
        grouped = choice.reshape(*choice.shape[:-1], config.n_group, -1)
        best = jax.lax.top_k(grouped, 2)[0].sum(-1) if config.group_score == "top2" else grouped.max(-1)
        kept = jax.nn.one_hot(jax.lax.top_k(best, config.topk_group)[1], config.n_group, dtype=bool).any(-2)
        choice = jnp.where(kept[..., None], grouped, -jnp.inf).reshape(choice.shape)
    ids = jax.lax.top_k(choice, config.num_experts_per_tok)[1]
    if replay is not None:
        ids = jnp.where(replay >= 0, replay, ids)
    gates = jnp.take_along_axis(scores, ids, axis=-1)
    if config.norm_topk_prob:
        gates = gates / (gates.sum(-1, keepdims=True) + 1e-20)
    return ids, gates * config.routed_scaling_factor


def _routed(
    p: dict,
    x: Float[Array, "B T D"],
    replay: Int[Array, "B T K"] | None,
    config: ModelConfig,
    paths: Paths,
    held: Axes,
) -> tuple[Float[Array, "B T D"], Int[Array, "B T K"]]:
    """Routed experts for the tokens at hand, and the experts chosen; within a mesh what one device does.

    Experts are spread over the mesh axes `held`.
    """
    ids, gates = route(p, config, x, replay)
    flat = (a.reshape(-1, a.shape[-1]) for a in (x, ids, gates))
    weights = tuple(p[name] for name in EXPERTS)
    y = experts_apart(*flat, weights, held, config, paths) if held else experts_local(*flat, *weights)
    return y.reshape(x.shape), ids


def moe(
    p: dict,
    config: ModelConfig,
    x: Float[Array, "B T D"],
    replay: Int[Array, "B T K"] | None = None,
    paths: Paths = DEFAULT_PATHS,
    axes: tuple[str | None, str | None] = ("rows", "residual"),
) -> tuple[Float[Array, "B T D"], Int[Array, "B T K"]]:
    """Routed experts plus shared ones; also the experts chosen.

    Neither waits for the other, so that the compiler may compute the shared ones while tokens travel. It does: with
    all_to_all on 16 chips of a v5p and of a v5e, V2-Lite's widths and the flags of launch/env.sh, it puts their first
    two products into the tokens' way back, and those of their gradients into the gradients' exchanges. A
    ragged_all_to_all it has nothing run beside on a v5p.

    Args:
        axes: logical axes of B and T, over all of which devices have tokens of their own for the experts.
    """
    layout = sharding.current()
    held = layout.mesh_axes("experts") if layout else ()
    run = partial(_routed, config=config, paths=paths, held=held)
    routed = {name: w for name, w in p.items() if name != "shared"}
    if layout:
        # Routing too is each device's own business: left to the partitioner, top_k gathers the scores of all rows.
        here = PartitionSpec(*layout.spec(axes), None)
        lies = dict.fromkeys(routed, PartitionSpec()) | dict.fromkeys(EXPERTS, PartitionSpec(held or None))
        specs = lies, here, None if replay is None else here
        run = jax.shard_map(run, mesh=layout.mesh, in_specs=specs, out_specs=(here, here), check_vma=False)
    y, ids = run(routed, x, replay)
    if "shared" in p:
        # Decoding splits the weights and not the rows: else they would be gathered for each step.
        y = y + mlp(p["shared"], sharding.constrain(x, "rows", "residual" if axes[1] else None, None))
    return y, ids


def expert_load(ids: Int[Array, "*n K"], counted: Array, experts: int) -> Float[Array, "E"]:
    """How many assignments each expert got among the counted tokens."""
    chosen = jax.nn.one_hot(ids, experts, dtype=jnp.float32).sum(-2)
    return jnp.where(counted[..., None], chosen, 0.0).reshape(-1, experts).sum(0)
