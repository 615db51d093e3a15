"""Tokens to experts on other devices and back: every token to everybody, or each only where it is needed.

"gather": the tokens of all devices that share the experts are gathered, and the sums are scattered back.
"all_to_all": a token goes once to each device that holds any of its experts (DeepSeek-V3, arXiv 2412.19437, section
2.1.2), with a fixed number of places per pair of devices. What finds no place goes in a further round, so that none is
dropped. There, routing limited to groups bounds to how many nodes a token goes, which then pass it on within: an
exchange of two stages, which this is not. Here it bounds the devices only while they are few: for DeepSeek-V3 a token
goes to 4 of 4 or 8 devices, but to 8, as many as it has experts, of 16 and more, as on a pod.
"ragged_all_to_all": each device sends each other what is for it, however much that is, once per expert. Only tokens
and gates travel, and how unevenly they go matters only where a device gets more than it has room for (then another
round follows). So on a pod: 256 devices that share the experts have 64 rows of 2,048 tokens for each other on average,
and some pair always much more. A v5e does not have it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from r1jax import sharding
from r1jax.model.config import ModelConfig, Paths
from r1jax.model.experts import (
    LANES,
    ROUTED,
    Weights,
    experts_own,
    experts_some,
    gather_sum,
    in_rounds,
    move,
    row_tile,
    spread,
    where_rows,
)


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
    places = -(-max(1, int(slack * n * peers_per_token(config, peers))) // (peers * 8)) * 8
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
        sent = (checkpoint_name(swap(a), ROUTED) for a in (spread(x, source, target), wanted, share))
        return gather_sum(swap(experts_some(*sent, weights, room)), source, target)

    rounds = jax.lax.pmax(jnp.maximum(-(-goes.sum(1).max() // places), 1), held) if most > 1 else 1
    return in_rounds(one, rounds, (order, place, peer, ids), (x, gates, weights))


# Of every pair of devices [from, to]: where what is sent begins in the sender's rows, how many rows that are, and
# where it begins in the receiver's.
Travel = tuple[Int[Array, "peers peers"], Int[Array, "peers peers"], Int[Array, "peers peers"]]


def _way_back(travel: Travel) -> Travel:
    begins, sizes, lands = travel
    return lands.T, sizes.T, begins.T


def _pieces(x: Float[Array, "m D"]) -> Float[Array, "m S L"]:
    """So that each row lies in one piece in a TPU's memory, where else tiles of several rows do."""
    return x.reshape(x.shape[0], -1, LANES if x.shape[1] % LANES == 0 else x.shape[1])


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _send(rows: Float[Array, "m S L"], travel: Travel, lengths: tuple[int, int], held: tuple[str, ...]) -> Array:
    """What comes of everybody's `rows` along `held`; rows that nobody sends hold anything.

    Args:
        lengths: rows there are to send, and to receive.
    """
    (begins, sizes, lands), here = travel, jax.lax.axis_index(held)
    if sharding.platform() == "cpu":  # has no such exchange: everything is gathered, and what is for this device taken
        at = jnp.arange(lengths[1])
        comes = (at[:, None] >= lands[:, here]) & (at[:, None] < (lands + sizes)[:, here])
        peer = jnp.argmax(comes, axis=1)
        found = jax.lax.all_gather(rows, held)[peer, at - lands[peer, here] + begins[peer, here]]
        return where_rows(comes.any(1), found)
    if sharding.device_kind() == "TPU v5 lite":
        raise ValueError(
            "config.model.expert_exchange is 'ragged_all_to_all', which a v5e does not have; set it to all_to_all"
        )
    ways = begins[here], sizes[here], lands[here], sizes[:, here]
    # To fill with zeros what is then written over takes as long as to send it.
    empty = jax.lax.empty((lengths[1], *rows.shape[1:]), rows.dtype)
    return jax.lax.ragged_all_to_all(rows, empty, *ways, axis_name=held)


_send.defvjp(
    lambda rows, travel, lengths, held: (_send(rows, travel, lengths, held), travel),
    lambda lengths, held, travel, grad: (_send(grad, _way_back(travel), lengths[::-1], held), None),
)


def _ragged_all_to_all(
    x: Array, ids: Array, gates: Array, weights: Weights, held: tuple[str, ...], config: ModelConfig, slack: float
) -> Array:
    (n, k), each, peers = ids.shape, weights[0].shape[0], jax.lax.axis_size(held)
    if n * k < peers:  # as in decoding: next to nothing for each, and a message to everybody takes its time
        return _gather(x, ids, gates, weights, held, config, slack)
    flat = ids.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    target = jnp.argsort(order).astype(order.dtype)
    counts = jax.lax.all_gather((flat[:, None] == jnp.arange(peers * each)).sum(0), held).reshape(peers, peers, each)
    sizes = counts.sum(2)
    begins = jnp.cumsum(sizes, 1) - sizes
    comes = jnp.cumsum(sizes, 0) - sizes  # where a sender's rows begin in all that a receiver gets
    room = max(1, int(slack * n * k))
    room = -(-room // (tile := row_tile(room, 8))) * tile

    def one(r: Array | int, ints: tuple, floats: tuple) -> Array:
        (flat, order, target, counts, sizes, begins, comes), (x, gates, weights) = ints, floats
        here, first = jax.lax.axis_index(held), r * room
        start, stop = (jnp.clip(edge - comes, 0, sizes) for edge in (first, first + room))
        travel = begins + start, stop - start, jnp.clip(comes + start - first, 0, room)
        peer, at = flat // each, target - begins[here, flat // each]
        goes = (at >= start[here, peer]) & (at < stop[here, peer])
        order, target = jnp.where(goes[order], order, -1), jnp.where(goes, target, -1)
        token, copies = jnp.where(order >= 0, order // k, -1), target.reshape(n, k)
        sent, share = (
            checkpoint_name(_send(a, travel, (n * k, room), held).reshape(room, -1), ROUTED)
            for a in (spread(_pieces(x), token, copies), _pieces(move(gates.reshape(-1, 1), order, target)))
        )
        ends = jnp.cumsum(counts[:, here].reshape(-1))  # by sender and expert
        at = first + jnp.arange(room)
        wanted = jnp.searchsorted(ends, at, side="right", method="compare_all") % each
        y = experts_own(sent, jnp.where(at < ends[-1], wanted, -1), weights, share)
        y = _send(_pieces(y), _way_back(travel), (room, n * k), held)
        return gather_sum(y, token, copies).reshape(x.shape)

    rounds = jnp.maximum(-(-sizes.sum(0).max() // room), 1) if n * k * peers > room else 1
    return in_rounds(one, rounds, (flat, order, target, counts, sizes, begins, comes), (x, gates, weights))


EXCHANGES = {"gather": _gather, "all_to_all": _all_to_all, "ragged_all_to_all": _ragged_all_to_all}


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
