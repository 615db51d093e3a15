"""DeepSeekMoE (arXiv 2401.06066; V3, 2412.19437, section 2.1.2): sigmoid router with a bias that only selects,
group-limited top-k, normalised and scaled gates, shared experts, dropless dispatch.

Tokens are sorted by expert into blocks that belong to one expert each, so the grouped product has static shapes and no
token is dropped (MegaBlocks, arXiv 2211.15841). Dispatch and combination are gathers in both directions: each is the
other's gradient.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from r1jax import sharding
from r1jax.model.config import ModelConfig
from r1jax.model.layers import Mlp, mlp, weight, zeros

Axes = tuple[str, ...]  # of the mesh


class Moe(nnx.Module):
    """Weights of `layers` stacked mixture layers; the router is float32 whatever the rest is."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig, layers: int, dtype: DTypeLike) -> None:
        c, s = config, config.initializer_range
        e, d, f = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
        self.router = weight(rngs, (layers, d, e), ("layers", "width", None), s, jnp.float32)
        if c.router_bias:
            self.router_bias = zeros((layers, e), ("layers", None), jnp.float32)
        self.gate = weight(rngs, (layers, e, d, f), ("layers", "experts", "width", "mlp"), s, dtype)
        self.up = weight(rngs, (layers, e, d, f), ("layers", "experts", "width", "mlp"), s, dtype)
        self.down = weight(rngs, (layers, e, f, d), ("layers", "experts", "mlp", "width"), s, dtype)
        if c.n_shared_experts:
            self.shared = Mlp(rngs, c, layers, c.n_shared_experts * f, dtype)


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


@jax.custom_vjp
def _move(x: Float[Array, "m D"], source: Int[Array, "r"], target: Int[Array, "m"]) -> Float[Array, "r D"]:
    """Row i of the result is x[source[i]], zero where source is negative; target is the inverse map."""
    del target
    return jnp.where((source >= 0)[:, None], x[source], 0)


def _move_forward(x: Array, source: Array, target: Array) -> tuple[Array, tuple[Array, Array]]:
    return _move(x, source, target), (source, target)


def _move_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, None, None]:
    source, target = saved
    return _move(grad, target, source), None, None


_move.defvjp(_move_forward, _move_backward)


def _block_rows(assigned: int, experts: int) -> int:
    """Rows of a block: about a quarter of an expert's mean share, so that padding stays small, within 8..128."""
    size = 8
    while size < 128 and size * 8 * experts <= assigned:
        size *= 2
    return size


def _plan(
    ids: Int[Array, "m"], experts: int, block: int
) -> tuple[Int[Array, "r"], Int[Array, "m"], Int[Array, "blocks"], Int[Array, "E"]]:
    """Where each assignment goes: sorted by expert, each expert's share padded to whole blocks.

    Ids outside 0..experts-1 belong to another device and go nowhere (-1).

    Returns:
        source of each padded row, target of each assignment, expert of each block, padded rows per expert.
    """
    m = ids.shape[0]
    total = -(-m // block) * block + experts * block
    mine = (ids >= 0) & (ids < experts)
    key = jnp.where(mine, ids, experts)
    order = jnp.argsort(key, stable=True)
    counts = (key[:, None] == jnp.arange(experts)).sum(0)
    padded = -(-counts // block) * block
    ends = jnp.cumsum(padded)
    rank = jnp.arange(m) - (jnp.cumsum(counts) - counts)[jnp.minimum(key[order], experts - 1)]
    row = jnp.where(key[order] < experts, (ends - padded)[jnp.minimum(key[order], experts - 1)] + rank, -1)
    target = jnp.zeros(m, jnp.int32).at[order].set(row.astype(jnp.int32), unique_indices=True)
    source = jnp.full(total, -1, jnp.int32).at[jnp.where(row < 0, total, row)].set(order.astype(jnp.int32), mode="drop")
    owner = jnp.searchsorted(ends, jnp.arange(total // block) * block, side="right")
    return source, target, jnp.minimum(owner, experts - 1), padded


@jax.custom_vjp
def _blocks(
    x: Float[Array, "r D"], w: Float[Array, "E D F"], owner: Int[Array, "blocks"], sizes: Int[Array, "E"]
) -> Float[Array, "r F"]:
    """Batched products of each block with its expert's matrix."""
    del sizes
    return jnp.einsum("bsd,bdf->bsf", x.reshape(owner.shape[0], -1, x.shape[-1]), w[owner]).reshape(x.shape[0], -1)


def _blocks_forward(x: Array, w: Array, owner: Array, sizes: Array) -> tuple[Array, tuple]:
    return _blocks(x, w, owner, sizes), (x, w, owner)


def _blocks_backward(saved: tuple, grad: Array) -> tuple:
    x, w, owner = saved
    x, grad = (a.reshape(owner.shape[0], -1, a.shape[-1]) for a in (x, grad))
    # The blocks' matrices are summed per expert by a product: as a scatter it takes most of the training step.
    each = jnp.einsum("bsd,bsf->bdf", x, grad).reshape(owner.shape[0], -1)
    dw = (jnp.arange(w.shape[0])[:, None] == owner).astype(each.dtype) @ each
    dx = jnp.einsum("bsf,bdf->bsd", grad, w[owner])
    return dx.reshape(-1, dx.shape[-1]), dw.reshape(w.shape), None, None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _ragged(x: Array, w: Array, owner: Array, sizes: Array) -> Array:
    del owner
    return jax.lax.ragged_dot(x, w, sizes)


def _grouped(
    x: Float[Array, "r D"], w: Float[Array, "E D F"], owner: Int[Array, "blocks"], sizes: Int[Array, "E"]
) -> Float[Array, "r F"]:
    """x's blocks times their own expert's matrix."""
    # On a CPU ragged_dot is a masked product with every expert: E times the work.
    return jax.lax.platform_dependent(x, w, owner, sizes, cpu=_blocks, default=_ragged)


def experts_local(
    x: Float[Array, "n D"],
    ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
) -> Float[Array, "n D"]:
    """Sum over each token's experts that are held here, times their gates."""
    n, k = ids.shape
    experts = gate.shape[0]
    source, target, owner, sizes = _plan(ids.reshape(-1), experts, _block_rows(n * k, experts))
    copies = jnp.broadcast_to(x[:, None], (n, k, x.shape[-1])).reshape(n * k, -1)
    h = _move(copies, source, target)
    h = jax.nn.silu(_grouped(h, gate, owner, sizes)) * _grouped(h, up, owner, sizes)
    y = _move(_grouped(h, down, owner, sizes), target, source).reshape(n, k, -1)
    return (y * gates[..., None].astype(y.dtype)).sum(1)


def _routed(
    p: dict, x: Float[Array, "B T D"], replay: Int[Array, "B T K"] | None, config: ModelConfig, held: Axes, split: Axes
) -> tuple[Float[Array, "B T D"], Int[Array, "B T K"]]:
    """Routed experts for the tokens at hand, and the experts chosen; within a mesh what one device does.

    The tokens of the mesh axes `held`, over which experts are spread, are gathered, the local experts work on them, and
    the sums are scattered back; over the axes `split` each expert's width is spread.
    """
    ids, gates = route(p, config, x, replay)
    chosen = ids
    if held:
        x, ids, gates = (jax.lax.all_gather(a, held, axis=0, tiled=True) for a in (x, ids, gates))
        ids = ids - jax.lax.axis_index(held) * p["gate"].shape[0]
    b, t, d = x.shape
    flat = (a.reshape(b * t, -1) for a in (x, ids, gates))
    y = experts_local(*flat, p["gate"], p["up"], p["down"]).reshape(b, t, d)
    if split:
        y = jax.lax.psum(y, split)
    return jax.lax.psum_scatter(y, held, scatter_dimension=0, tiled=True) if held else y, chosen


def moe(
    p: dict, config: ModelConfig, x: Float[Array, "B T D"], replay: Int[Array, "B T K"] | None = None
) -> tuple[Float[Array, "B T D"], Int[Array, "B T K"]]:
    """Routed experts plus shared ones; also the experts chosen."""
    layout = sharding.current()
    held, split = (layout.mesh_axes("experts"), layout.mesh_axes("mlp")) if layout else ((), ())
    run = partial(_routed, config=config, held=held, split=split)
    routed = {name: w for name, w in p.items() if name != "shared"}
    if layout:
        # Routing too is each device's own business: left to the partitioner, top_k gathers the scores of all rows.
        here = PartitionSpec(*layout.spec(("rows", "tokens")), None)
        w_in = PartitionSpec(held or None, None, split or None)
        lies = dict.fromkeys(routed, PartitionSpec()) | {"gate": w_in, "up": w_in}
        lies["down"] = PartitionSpec(held or None, split or None, None)
        specs = lies, here, None if replay is None else here
        run = jax.shard_map(run, mesh=layout.mesh, in_specs=specs, out_specs=(here, here), check_vma=False)
    y, ids = run(routed, x, replay)
    if "shared" in p:
        y = y + mlp(p["shared"], x)
    return y, ids


def expert_load(ids: Int[Array, "*n K"], counted: Array, experts: int) -> Float[Array, "E"]:
    """How many assignments each expert got among the counted tokens."""
    chosen = jax.nn.one_hot(ids, experts, dtype=jnp.float32).sum(-2)
    return jnp.where(counted[..., None], chosen, 0.0).reshape(-1, experts).sum(0)
