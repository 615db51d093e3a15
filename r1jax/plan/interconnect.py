"""How long a collective takes on a torus, from which devices take part and what each link carries. An estimate.

Ring algorithms over every dimension at once, as in "How to Scale Your Model" (scaling-book, chapter 3), without
latency: a gather of n bytes takes n over the links a chip has into the group; an exchange of all with all is bound by
the links in the middle of its longest dimension. Groups that interleave along a dimension share its links.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax

from r1jax.plan.topology import Topology

LATENCY_S = 1e-6  # a hop, set-up included: our round number; it matters only where little is sent


@dataclasses.dataclass(frozen=True)
class Span:
    """What a group covers of one dimension of the torus: so many places, so far apart, closed to a ring or not."""

    places: int
    stride: int
    is_ring: bool


def spans(topology: Topology, group: Sequence[jax.Device]) -> list[Span]:
    """The dimensions along which a group extends."""
    out = []
    for dimension in range(len(topology.shape)):
        at = sorted({d.coords[dimension] for d in group})
        if len(at) > 1:
            stride = min(b - a for a, b in itertools.pairwise(at))
            whole = len(at) * stride == topology.shape[dimension]
            out.append(Span(len(at), stride, whole and topology.wraps(dimension)))
    return out


def _gather_bandwidth(topology: Topology, over: list[Span]) -> float:
    return sum(topology.chip.link * (2 if s.is_ring else 1) / s.stride for s in over)


def seconds(topology: Topology, kind: str, size: float, group: Sequence[jax.Device]) -> float:
    """Time of one collective.

    Args:
        size: bytes on one device: what an all-gather gives, a reduce-scatter takes, an all-reduce or exchange has.
        group: the devices of one of its groups.
    """
    n = len(group)
    if n < 2 or not size:
        return 0.0
    if (slices := len({getattr(d, "slice_index", 0) for d in group})) > 1:
        return dcn_seconds(topology, kind, size, slices)
    over = spans(topology, group)
    if not over:  # two cores of one chip
        return 0.0
    hops = sum(s.places for s in over) * LATENCY_S
    if kind in ("all-to-all", "ragged-all-to-all"):
        worst = max(s.places * s.stride / (8 if s.is_ring else 4) for s in over)
        return size * worst / topology.chip.link + hops
    times = 2 if kind == "all-reduce" else 1
    return times * (size * (n - 1) / n / _gather_bandwidth(topology, over) + hops)


def dcn_seconds(topology: Topology, kind: str, size: float, slices: int) -> float:
    """Time of a collective between devices that stand at the same place of so many slices; `size` as in `seconds`."""
    times = {"all-reduce": 2, "collective-permute": slices / (slices - 1)}.get(kind, 1)
    return times * size * (slices - 1) / slices / topology.chip.dcn


def permute_seconds(topology: Topology, size: float, pairs: Sequence[tuple[jax.Device, jax.Device]]) -> float:
    """Time of a collective-permute that sends `size` bytes along every pair: that of its busiest link.

    Messages go the shorter way round, one dimension after the other.
    """
    if any(getattr(a, "slice_index", 0) != getattr(b, "slice_index", 0) for a, b in pairs):
        return size / topology.chip.dcn
    load: collections.Counter[tuple] = collections.Counter()
    for a, b in pairs:
        at = list(a.coords)
        for dimension, n in enumerate(topology.shape):
            ahead = b.coords[dimension] - at[dimension]
            if topology.wraps(dimension) and abs(ahead) > n / 2:
                ahead -= math.copysign(n, ahead)
            step = int(math.copysign(1, ahead))
            for _ in range(abs(int(ahead))):
                load[*at, dimension, step] += 1
                at[dimension] = (at[dimension] + step) % n
    return size * max(load.values(), default=0) / topology.chip.link + LATENCY_S


def axes(mesh: jax.sharding.Mesh, group: Sequence[int]) -> str:
    """The mesh axes along which a group's members differ, of devices named by their place in the mesh."""
    shape = tuple(mesh.shape.values())
    places = [[i // math.prod(shape[axis + 1 :]) % shape[axis] for axis in range(len(shape))] for i in group]
    names = [
        name for name, along in zip(mesh.axis_names, zip(*places, strict=True), strict=True) if len(set(along)) > 1
    ]
    return "+".join(names)
