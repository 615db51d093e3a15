"""Attention over rows that are too long for one table of scores, or whose tokens are spread over devices.

Context parallelism by gathering (Llama 3, arXiv 2407.21783, section 3.3.2): each device keeps its own queries, gathers
what keys and values are made of, and makes them for its own heads. For latent attention that is 576 values a token.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from r1jax import sharding
from r1jax.model import blockwise
from r1jax.model.blockwise import Reading
from r1jax.model.layers import Mask

LogicalAxes = tuple[str | None, ...]


class Source(NamedTuple):
    """What keys and values are made of: `expand(*kept, *weights)` gives them.

    kept: arrays [B, T, ...] of the tokens at hand, with the logical axes `axes`; weights, with theirs, `lies`.
    """

    kept: tuple[Array, ...]
    axes: tuple[LogicalAxes, ...]
    weights: tuple[Array, ...]
    lies: tuple[LogicalAxes, ...]
    expand: Callable[..., tuple[Array, Array]]


def _kernel(*given: Array | Reading | float) -> Array:
    from r1jax.model.kernels import flash  # here, since Pallas takes a second to import

    return flash.attend(*given, interpret=sharding.platform() != "tpu")


PATHS = {"blocks": blockwise.attend, "kernel": _kernel}


def attend(q: Float[Array, "B T K g h"], source: Source, mask: Mask, scale: float) -> Float[Array, "B T K g w"]:
    """Softmax attention by mask.path, each device for its own queries and heads."""
    run = PATHS[mask.path]
    layout = sharding.current()
    if layout is None:
        k, v = source.expand(*source.kept, *source.weights)
        return run(q, k, v, Reading(mask.segments, mask.parents, mask.segments, jnp.int32(0)), scale)
    split = layout.mesh_axes("tokens")

    def here(q: Array, segments: Array, parents: Array, kept: tuple, weights: tuple) -> Array:
        keys, start = segments, jnp.int32(0)
        if split:
            start = jax.lax.axis_index(split) * segments.shape[1]
            keys, *kept = (jax.lax.all_gather(a, split, axis=1, tiled=True) for a in (segments, *kept))
        k, v = source.expand(*kept, *weights)
        return run(q, k, v, Reading(segments, parents, keys, start), scale)

    queries, ids = layout.spec(("rows", "tokens", "kv_heads", None, None)), layout.spec(("rows", "tokens"))
    specs = queries, ids, ids, tuple(map(layout.spec, source.axes)), tuple(map(layout.spec, source.lies))
    here = jax.shard_map(here, mesh=layout.mesh, in_specs=specs, out_specs=queries, check_vma=False)
    return here(q, mask.segments, mask.parents, source.kept, source.weights)
