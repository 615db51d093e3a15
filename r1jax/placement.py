"""Which device of a TPU slice stands where in the mesh.

jax's own mesh_utils lays an axis along whole dimensions of the torus. An exchange of all with all is bound by the
longest dimension of the devices that take part, so those that share experts should form as near a cube as they can:
the 256 of 8x8x16 chips as 8x8x4 and not as 8x2x16, which takes twice as long.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np

Split = tuple[int, ...]  # how many places an axis takes along each dimension of the torus


def place(shape: Sequence[int], devices: Sequence[jax.Device], exchanging: int) -> np.ndarray:
    """The devices of one slice as an array of this shape, the last axes innermost on the torus.

    Args:
        exchanging: so many of the last axes are of devices that exchange all with all.
    """
    at = np.array([(*d.coords, d.core_on_chip) for d in devices])
    torus = tuple(int(n) for n in at.max(0) - at.min(0) + 1)
    if math.prod(torus) != len(devices):
        raise ValueError(f"{len(devices)} devices do not fill the torus {torus} of their coordinates")
    grid = np.empty(torus, object)
    for device, where in zip(devices, at - at.min(0), strict=True):
        grid[tuple(where)] = device
    splits = min(_ways(tuple(shape), torus), key=lambda way: _cost(way, torus, exchanging))
    # Every dimension of the torus falls apart into the parts that the axes take of it, outermost first.
    parts = grid.reshape([split[dimension] for dimension in range(len(torus)) for split in splits])
    order = [dimension * len(shape) + axis for axis in range(len(shape)) for dimension in range(len(torus))]
    return parts.transpose(order).reshape(shape)


def _ways(shape: Split, torus: Split) -> Iterator[tuple[Split, ...]]:
    """All ways to split every axis over the dimensions of the torus so that each dimension is used up."""
    if not shape:
        yield ()
        return
    # The innermost axis last: what is left of the torus goes to those before it.
    for split in _factors(shape[-1], torus):
        rest = tuple(n // m for n, m in zip(torus, split, strict=True))
        for before in _ways(shape[:-1], rest):
            yield (*before, split)


def _factors(size: int, torus: Split) -> Iterator[Split]:
    if not torus:
        if size == 1:
            yield ()
        return
    for n in range(1, size + 1):
        if size % n == 0 and torus[0] % n == 0:
            for rest in _factors(size // n, torus[1:]):
                yield (n, *rest)


def _cost(way: tuple[Split, ...], torus: Split, exchanging: int) -> tuple:
    """Load of the busiest link when those that exchange do so, then how each axis lies, the innermost first."""
    together = [math.prod(split[d] for split in way[len(way) - exchanging :]) for d in range(len(torus))]
    load = max(_load(n, 1, whole) for n, whole in zip(together, torus, strict=True))
    by_axis = []
    inside = [1] * len(torus)
    for split in reversed(way):
        # Along one dimension neighbours stay neighbours, as products that pass their parts around want it.
        spread = sum(n > 1 for n in split)
        by_axis.append((spread, max(_load(n, m, whole) for n, m, whole in zip(split, inside, torus, strict=True))))
        inside = [n * m for n, m in zip(split, inside, strict=True)]
    return load, *by_axis, way


def _load(places: int, stride: int, whole: int) -> float:
    """Of the middle link of so many places, in messages of one device to all."""
    return 0.0 if places == 1 else places * stride / (8 if places * stride == whole else 4)


def over_slices(shape: Sequence[int], devices: Sequence[jax.Device], exchanging: int) -> np.ndarray:
    """The same for one slice or several, which lie along the first axis.

    Raises:
        ValueError: the first axis is no multiple of the slices.
    """
    key = lambda d: getattr(d, "slice_index", 0)  # noqa: E731
    slices = [list(of) for _, of in itertools.groupby(sorted(devices, key=key), key)]
    if shape[0] % len(slices):
        raise ValueError(
            f"config.mesh.data is {shape[0]}, but only the axis data may lie across slices, and there are "
            f"{len(slices)}; make config.mesh.data a multiple of {len(slices)}"
        )
    inside = (shape[0] // len(slices), *shape[1:])
    return np.concatenate([place(inside, of, exchanging) for of in slices])
