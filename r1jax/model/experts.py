"""Grouped products: each token through its own experts, without a dropped token or a product for nothing.

Tokens are sorted by expert, so that the grouped product has static shapes (MegaBlocks, arXiv 2211.15841). Dispatch and
combination are gathers in both directions: each is the other's gradient. Where experts are spread over devices, nobody
knows how many assignments will come: there is room for a multiple of the mean, and what is left takes another round.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from r1jax import sharding
from r1jax.model.quantize import Matrix, Quantized

Weights = tuple[Matrix, Matrix, Matrix]  # gate and up [E, D, F], down [E, F, D]

ROUTED = "routed"  # names what came to experts and what they made of it before their last product: transformer.REMAT
FURTHER_ROUNDS = "further_rounds"  # names loops that seldom have anything to do: r1jax.plan counts on that
FEW = 256  # rows per copy: as many operations as a TPU does while it moves a token once through memory
TILE = 512  # rows of megablox's tile on TPU; its other sides below
TILE_SIDES = 1024, 1024
LANES = 128


def where_rows(keep: Bool[Array, "r"], rows: Float[Array, "r *D"]) -> Float[Array, "r *D"]:
    """The rows to keep, zeros in place of the others."""
    return jnp.where(keep.reshape(-1, *(1,) * (rows.ndim - 1)), rows, 0)


@jax.custom_vjp
def move(x: Float[Array, "m *D"], source: Int[Array, "r"], target: Int[Array, "m"]) -> Float[Array, "r *D"]:
    """Row i of the result is x[source[i]], zero where source is negative; target is the inverse map."""
    del target
    return where_rows(source >= 0, x[source])


def _move_forward(x: Array, source: Array, target: Array) -> tuple[Array, tuple[Array, Array]]:
    return move(x, source, target), (source, target)


def _move_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, None, None]:
    source, target = saved
    return move(grad, target, source), None, None


move.defvjp(_move_forward, _move_backward)


@jax.custom_vjp
def spread(x: Float[Array, "n *D"], source: Int[Array, "r"], target: Int[Array, "n K"]) -> Float[Array, "r *D"]:
    """Row i of the result is x[source[i]], zero where source is negative; target says where a token's copies go."""
    del target
    return where_rows(source >= 0, x[source])


@jax.custom_vjp
def gather_sum(rows: Float[Array, "r *D"], source: Int[Array, "r"], target: Int[Array, "n K"]) -> Float[Array, "n *D"]:
    """Of each token the sum of its copies: the transpose of `spread`. Rows without a source may hold anything."""
    if rows.shape[0] <= FEW * target.shape[1]:  # one product is less than K passes over all tokens
        is_of = (target[:, :, None] == jnp.arange(rows.shape[0])).any(1).astype(rows.dtype)
        rows = where_rows(source >= 0, rows)
        return jnp.einsum("nr,r...->n...", is_of, rows, preferred_element_type=jnp.float32).astype(rows.dtype)
    start = jnp.zeros((target.shape[0], *rows.shape[1:]), rows.dtype)

    # One copy after the other: all at once they would be K times the tokens.
    def add(total: Array, at: Array) -> tuple[Array, None]:
        return (total + where_rows(at >= 0, rows[at]), None)

    return jax.lax.scan(add, start, target.T)[0]


spread.defvjp(
    lambda x, source, target: (spread(x, source, target), (source, target)),
    lambda saved, grad: (gather_sum(grad, *saved), None, None),
)
gather_sum.defvjp(
    lambda rows, source, target: (gather_sum(rows, source, target), (source, target)),
    lambda saved, grad: (spread(grad, *saved), None, None),
)


def _block_rows(assigned: int, experts: int) -> int:
    """Rows of a block: about a quarter of an expert's mean share, so that padding stays small, within 8..128."""
    size = 8
    while size < 128 and size * 8 * experts <= assigned:
        size *= 2
    return size


def row_tile(rows: int, block: int) -> int:
    """Of what so many rows are made a multiple, for the sake of the TPU's grouped product; at least a block."""
    return TILE if rows >= TILE else 128 if rows >= 128 else block


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
    return jax.lax.ragged_dot(x, w, sizes, preferred_element_type=None if w.dtype == x.dtype else x.dtype)


def _megablox(x: Array, w: Array, owner: Array, sizes: Array) -> Array:
    from jax.experimental.pallas.ops.tpu.megablox import ops  # here, since Pallas takes a second to import

    del owner
    # Whole lanes: the gradient takes these sides for the other ones, and what is narrow need not be so there.
    sides = (min(most, -(-n // LANES) * LANES) for most, n in zip(TILE_SIDES, w.shape[1:], strict=True))
    tile = x.shape[0] if x.shape[0] <= TILE else math.gcd(TILE, x.shape[0]), *sides
    return ops.gmm(x, w, sizes.astype(jnp.int32), x.dtype, tile)


# By the kind of device. ragged_dot is a masked product with every expert, E times the work, where it has no kernel.
GROUPED = {"cpu": _blocks, "gpu": _ragged, "TPU v5": _ragged, "TPU v5p": _ragged, "tpu": _megablox}


# Whose kernel takes int8 as it is. For the others, and for float8, each product first writes its experts out in the
# compute dtype: a layer's for a moment, but then a step moves five bytes a weight where bfloat16 has it move two.
READ_INT8 = "TPU v5", "TPU v5p"


def _grouped(
    x: Float[Array, "r D"], w: Matrix, owner: Int[Array, "blocks"], sizes: Int[Array, "E"]
) -> Float[Array, "r F"]:
    """x's blocks times their own expert's matrix."""
    kind = sharding.device_kind()
    run = GROUPED[kind if kind in GROUPED else sharding.platform()]
    if sharding.platform() == "tpu" and x.shape[0] >= TILE * sizes.shape[0]:
        run = _megablox  # of ragged_dot a tile has 128 rows, for which it reads a matrix anew: too few to be worth it
    if not isinstance(w, Quantized):
        return run(x, w, owner, sizes)
    is_read = w.values.dtype == jnp.int8 and run is _ragged and kind in READ_INT8
    y = run(x, w.values if is_read else w.values.astype(x.dtype), owner, sizes)
    scaled = y.reshape(owner.shape[0], -1, y.shape[-1]) * w.scale[owner]
    return scaled.reshape(y.shape).astype(x.dtype)


def _through(
    h: Array, weights: Weights, owner: Array, sizes: Array, share: Float[Array, "r 1"] | None = None
) -> Float[Array, "r D"]:
    """Each block through its expert, times `share`: before the last product, whose result no gradient needs then."""
    gate, up, down = weights
    opened, passed = (checkpoint_name(_grouped(h, w, owner, sizes), ROUTED) for w in (gate, up))
    h = jax.nn.silu(opened) * passed
    return _grouped(h if share is None else h * share.astype(h.dtype), down, owner, sizes)


def _lengthen(source: Array, owner: Array, rows: int, block: int) -> tuple[Array, Array]:
    """The same plan for so many rows; further ones are of no assignment."""
    source = jnp.pad(source, (0, rows - source.shape[0]), constant_values=-1)
    return source, jnp.pad(owner, (0, rows // block - owner.shape[0]), mode="edge")


def experts_own(
    x: Float[Array, "m D"], ids: Int[Array, "m"], weights: Weights, share: Float[Array, "m 1"] | None = None
) -> Float[Array, "m D"]:
    """Each row through its own expert, times `share`.

    Rows of none (ids outside 0..E-1) come last, hold anything and give anything: no product reads them, nor does its
    gradient.
    """
    (m,), experts = ids.shape, weights[0].shape[0]
    block = _block_rows(m, experts)
    if experts == 1 and m % block == 0:  # nothing to sort
        return _through(x, weights, jnp.zeros(m // block, jnp.int32), (ids == 0).sum(keepdims=True), share)
    source, target, owner, sizes = _plan(ids, experts, block)
    rows = source.shape[0]
    if sharding.platform() == "tpu":
        rows = -(-rows // (tile := row_tile(rows, block))) * tile
    source, owner = _lengthen(source, owner, rows, block)
    share = None if share is None else move(share, source, target)
    return move(_through(move(x, source, target), weights, owner, sizes, share), target, source)


def experts_local(
    x: Float[Array, "n D"],
    ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    gate: Matrix,
    up: Matrix,
    down: Matrix,
) -> Float[Array, "n D"]:
    """Sum over each token's experts, all of which are held here, times their gates."""
    n, k = ids.shape
    copies = jnp.broadcast_to(x[:, None], (n, k, x.shape[-1])).reshape(n * k, -1)
    y = experts_own(copies, ids.reshape(-1), (gate, up, down)).reshape(n, k, -1)
    return (y * gates[..., None].astype(y.dtype)).sum(1)


def experts_some(
    x: Float[Array, "n D"],
    ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    weights: Weights,
    room: int,
) -> Float[Array, "n D"]:
    """The same where most assignments are for experts elsewhere (ids outside 0..E-1).

    Args:
        room: assignments that one round takes.
    """
    k, experts = ids.shape[1], weights[0].shape[0]
    block = _block_rows(room, experts)
    source, target, owner, sizes = _plan(ids.reshape(-1), experts, block)
    tile = row_tile(room, block)
    room = min(-(-(room + experts * block) // tile) * tile, -(-source.shape[0] // tile) * tile)
    most = -(-source.shape[0] // room)
    source, owner = _lengthen(source, owner, most * room, block)
    ends = jnp.cumsum(sizes)

    def one(r: Array | int, ints: tuple, floats: tuple) -> Array:
        (source, target, owner, ends), (x, gates, weights) = ints, floats
        first = r * room
        here = jax.lax.dynamic_slice_in_dim(source, first, room)
        owner = jax.lax.dynamic_slice_in_dim(owner, first // block, room // block)
        sizes = jnp.diff(jnp.clip(ends - first, 0, room), prepend=0)
        target = jnp.where((target >= first) & (target < first + room), target - first, -1)
        token, target_of = jnp.where(here >= 0, here // k, -1), target.reshape(-1, k)
        share = move(gates.reshape(-1, 1), here, target)
        y = _through(spread(x, token, target_of), weights, owner, sizes, share)
        return gather_sum(y, token, target_of)

    rounds = jnp.maximum(-(-ends[-1] // room), 1) if most > 1 else 1
    return in_rounds(one, rounds, (source, target, owner, ends), (x, gates, weights))


def in_rounds(one: Callable[..., Array], rounds: Array | int, ints: tuple, floats: tuple) -> Array:
    """The sum of one(r, ints, floats) over `rounds` rounds, with its gradient in `floats`.

    The first stands outside of the loop, which seldom has anything to do.
    """
    if isinstance(rounds, int):
        assert rounds == 1
        return one(0, ints, floats)

    def rest(rounds: Array, start: tuple | Array, of: Callable[[Array], tuple | Array]) -> tuple | Array:
        add = partial(jax.tree.map, jnp.add)
        with jax.named_scope(FURTHER_ROUNDS):
            return jax.lax.fori_loop(1, rounds, lambda r, total: add(total, of(r)), start)

    @jax.custom_vjp
    def total(rounds: Array, ints: tuple, floats: tuple) -> Array:
        return rest(rounds, one(0, ints, floats), lambda r: one(r, ints, floats))

    def forward(rounds: Array, ints: tuple, floats: tuple) -> tuple[Array, tuple]:
        first, pull = jax.vjp(partial(one, 0, ints), floats)
        return rest(rounds, first, lambda r: one(r, ints, floats)), (rounds, ints, floats, pull)

    def backward(saved: tuple, grad: Array) -> tuple[None, None, tuple]:
        rounds, ints, floats, pull = saved
        of = lambda r: jax.vjp(partial(one, r, ints), floats)[1](grad)[0]  # noqa: E731
        return None, None, rest(rounds, pull(grad)[0], of)

    total.defvjp(forward, backward)
    return total(rounds, ints, floats)
