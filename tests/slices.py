"""Slices of TPUs of which only the places of their chips are known."""

import types

import numpy as np

from r1jax.plan import topology


def slice_of(name: str) -> topology.Topology:
    """A topology whose devices are only places on the torus."""
    kind, shape, slices = topology.parse(name)
    devices = tuple(
        types.SimpleNamespace(coords=tuple(int(i) for i in at), core_on_chip=0, slice_index=s, platform="tpu")
        for s in range(slices)
        for at in np.ndindex(shape)
    )
    return topology.Topology(name, topology.CHIPS[kind], shape, slices, devices)
