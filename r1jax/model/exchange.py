"""Tokens to experts on other devices and back: every token to everybody, or each only where it is needed.

"gather": the tokens of all devices that share the experts are gathered, and the sums are scattered back.
"all_to_all": a token goes once to each device that holds any of its experts (DeepSeek-V3, arXiv 2412.19437, section
2.1.2), with a fixed number of places per pair of devices. What finds no place goes in a further round, so that none is
dropped. There, routing limited to groups bounds to how many nodes a token goes, which then pass it on within: an
exchange of two stages, which this is not. Here it bounds the devices only while they are few: for DeepSeek-V3 a token
goes to 4 of 4 or 8 devices, but to 8, as many as it has experts, of 16 and more, as on a pod.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from r1jax.model.config import ModelConfig, Paths
from r1jax.model.experts import Weights, experts_some, gather_sum, in_rounds, spread


def peers_per_token(config: ModelConfig, peers: int) -> int:
    """Over how many of the devices that share the experts a token's experts can lie.

    Groups of experts bound it where they are few devices each; on a pod, with many, it is the number of its experts.
    """
    per_group = -(-peers // config.n_group)
    return min(config.num_experts_per_tok, peers, config.topk_group * per_group)


def _gather(
    x: Array, ids: Array, gates: Array, weights: Weights, held: tuple[str, ...], config: ModelConfig, slack: float
) -> Array:
    del config
    room = int(slack * ids.size)
    x, ids, gates = (jax.lax.all_gather(a, held, axis=0, tiled=True) for a in (x, ids, gates))
    y = experts_some(x, ids - jax.lax.axis_index(held) * weights[0].shape[0], gates, weights, room)
    return jax.lax.psum_scatter(y, held, scatter_dimension=0, tiled=True)


def _first_of_peer(peer: Int[Array, "n K"]) -> Bool[Array, "n K"]:
    """Whether no earlier expert of the token lies with the same peer."""
    k = peer.shape[1]
    same = peer[:, :, None] == peer[:, None, :]
    return ~(same & jnp.tril(jnp.ones((k, k), bool), -1)).any(-1)


def _all_to_all(
    x: Array, ids: Array, gates: Array, weights: Weights, held: tuple[str, ...], config: ModelConfig, slack: float
) -> Array:
    n, k = ids.shape
    each, peers = weights[0].shape[0], jax.lax.axis_size(held)
    places = -(-int(slack * n * peers_per_token(config, peers)) // (peers * 8)) * 8
    if places >= n:  # as in decoding: every peer would get all tokens, and a gather takes more of a torus's links
        return _gather(x, ids, gates, weights, held, config, slack)
    room = int(slack * n * k)
    peer = ids // each
    goes = (peer[:, :, None] == jnp.arange(peers)).any(1).T  # [peers, n]
    number = jnp.cumsum(goes, axis=1) - 1
    place = jnp.where(_first_of_peer(peer), jnp.take_along_axis(number.T, peer, axis=1), -1)
    most = -(-n // places)
    order = jnp.argsort(~goes, axis=1, stable=True)
    order = jnp.where(jnp.arange(n) < goes.sum(1, keepdims=True), order, -1)
    order = jnp.pad(order, ((0, 0), (0, most * places - n)), constant_values=-1)

    def swap(a: Array) -> Array:
        return jax.lax.all_to_all(a, held, 0, 0, tiled=True)

    def one(r: Array | int, ints: tuple, floats: tuple) -> Array:
        (order, place, peer, ids), (x, gates, weights) = ints, floats
        first = r * places
        source = jax.lax.dynamic_slice_in_dim(order, first, places, axis=1).reshape(-1)
        is_here = (place >= first) & (place < first + places)
        target = jnp.where(is_here, peer * places + place - first, -1)
        there = jnp.repeat(jnp.arange(peers), places)[:, None]
        wanted = jnp.where((source >= 0)[:, None], ids[source], -1) - there * each
        is_there = (wanted >= 0) & (wanted < each)
        # Of a token's experts no more than a peer holds are there.
        held_there = jnp.argsort(~is_there, axis=1, stable=True)[:, : min(k, each)]
        wanted, share = (
            jnp.take_along_axis(a, held_there, axis=1)
            for a in (jnp.where(is_there, wanted, -1), spread(gates, source, target))
        )
        sent = swap(spread(x, source, target)), swap(wanted), swap(share)
        return gather_sum(swap(experts_some(*sent, weights, room)), source, target)

    rounds = jax.lax.pmax(jnp.maximum(-(-goes.sum(1).max() // places), 1), held) if most > 1 else 1
    return in_rounds(one, rounds, (order, place, peer, ids), (x, gates, weights))


EXCHANGES = {"gather": _gather, "all_to_all": _all_to_all}


def experts_apart(
    x: Float[Array, "n D"],
    ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    weights: Weights,
    held: tuple[str, ...],
    config: ModelConfig,
    paths: Paths,
) -> Float[Array, "n D"]:
    """Sum over each token's experts, spread over the mesh axes `held`, times their gates; what one device does."""
    return EXCHANGES[paths.expert_exchange](x, ids, gates, weights, held, config, paths.expert_slack)
