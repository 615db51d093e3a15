"""Laws of the torus: what a collective costs between which chips, and which chips stand side by side in a mesh."""

import types

import pytest
from slices import slice_of

from r1jax import placement, sharding
from r1jax.plan import interconnect, topology


def row_of(slice_: topology.Topology, dimension: int, n: int, stride: int = 1) -> list:
    return [d for d in slice_.devices if all(c == 0 for i, c in enumerate(d.coords) if i != dimension)][::stride][:n]


def test_a_gather_is_bound_by_the_links_into_a_chip():
    slice_ = slice_of("v5p:8x8x16")
    link = slice_.chip.link
    ring = row_of(slice_, 2, 16)
    assert interconnect.seconds(slice_, "all-gather", 1e9, ring) == pytest.approx(1e9 * 15 / 16 / (2 * link), rel=0.01)
    # Half a ring has no way back, and an all-reduce is a scatter and a gather.
    half = interconnect.seconds(slice_, "all-gather", 1e9, row_of(slice_, 2, 8))
    assert half == pytest.approx(1e9 * 7 / 8 / link, rel=0.01)
    assert interconnect.seconds(slice_, "all-reduce", 1e9, row_of(slice_, 2, 8)) == pytest.approx(2 * half, rel=0.01)
    # Every other chip of a ring: the other half uses the same links.
    every_other = interconnect.seconds(slice_, "all-gather", 1e9, row_of(slice_, 2, 8, stride=2))
    assert every_other == pytest.approx(1e9 * 7 / 8 / link, rel=0.01)


def test_two_slices_meet_over_the_slow_network():
    slices = slice_of("2*v5e:4x4")
    pair = [slices.devices[0], slices.devices[16]]
    # A slice has half of what is gathered, and sends it; of a sum each half goes to be added and comes back.
    assert interconnect.seconds(slices, "all-gather", 1e9, pair) == 0.5e9 / slices.chip.dcn
    assert interconnect.seconds(slices, "all-reduce", 1e9, pair) == 1e9 / slices.chip.dcn
    assert interconnect.dcn_seconds(slices, "all-reduce", 1e9, slices=4) == 1.5e9 / slices.chip.dcn
    assert interconnect.dcn_seconds(slices, "collective-permute", 1e9, slices=4) == pytest.approx(1e9 / 3.1e9)
    assert slices.chips == 32


def test_a_shift_around_a_ring_loads_each_link_once():
    slice_ = slice_of("v5p:8x8x16")
    link = slice_.chip.link
    ring = row_of(slice_, 0, 8)
    shift = list(zip(ring, ring[1:] + ring[:1], strict=True))
    assert interconnect.permute_seconds(slice_, 1e9, shift) == pytest.approx(1e9 / link, rel=0.01)
    # Half of a ring: the last sends back over links that nobody else uses that way. By two: each link serves two.
    half = list(zip(ring[:4], [*ring[1:4], ring[0]], strict=True))
    assert interconnect.permute_seconds(slice_, 1e9, half) == pytest.approx(1e9 / link, rel=0.01)
    # The first sends to the last the short way, and not over the link that another uses.
    short = [(ring[0], ring[7]), (ring[5], ring[6])]
    assert interconnect.permute_seconds(slice_, 1e9, short) == pytest.approx(1e9 / link, rel=0.01)
    by_two = list(zip(ring, ring[2:] + ring[:2], strict=True))
    assert interconnect.permute_seconds(slice_, 1e9, by_two) == pytest.approx(2e9 / link, rel=0.01)


def test_devices_that_share_experts_are_near_a_cube():
    slice_ = slice_of("v5p:8x8x16")
    # Sixteen for tensor would fit a whole dimension, but then the group would be a long one.
    for shape in ((1, 4, 16, 1, 16), (1, 4, 32, 1, 8)):
        mesh = placement.over_slices(shape, slice_.devices, exchanging=3)
        assert {d.coords for d in mesh.flat} == {d.coords for d in slice_.devices}
        group = list(mesh[0, 0].flat)
        assert [len({d.coords[i] for d in group}) for i in range(3)] == [8, 8, 4]
    # As whole dimensions they would be 8 x 2 x 16, whose middle carries twice as much.
    long = [d for d in slice_.devices if d.coords[1] < 2]
    exchange = [interconnect.seconds(slice_, "all-to-all", 1e9, devices) for devices in (group, long)]
    assert exchange[1] == pytest.approx(2 * exchange[0], rel=0.01)
    # The innermost axis goes round one ring, each device beside the next.
    assert [d.coords[0] for d in mesh[0, 0, 0, 0]] == list(range(8))
    assert len({d.coords[1:] for d in mesh[0, 0, 0, 0]}) == 1


def test_slices_lie_along_data():
    slices = slice_of("2*v5e:4x4")
    mesh = placement.over_slices((4, 8, 1, 1, 1), slices.devices, exchanging=3)
    assert [{d.slice_index for d in row.flat} for row in mesh] == [{0}, {0}, {1}, {1}]
    with pytest.raises(ValueError, match=r"config.mesh.data is 1, .* make config.mesh.data a multiple of 2"):
        placement.over_slices((1, 32, 1, 1, 1), slices.devices, exchanging=3)


def test_data_lies_over_the_slices_in_decoding_too(monkeypatch):
    slices = slice_of("2*v5e:4x4")
    monkeypatch.setattr(sharding, "_mesh", lambda devices: types.SimpleNamespace(devices=devices, size=devices.size))
    mesh = sharding.make_mesh({"data": 2, "fsdp": 16}, list(slices.devices))
    with pytest.raises(ValueError, match=r"config.decode_mesh.data is 1, .* make config.decode_mesh.data a multiple"):
        sharding.layouts(mesh, {"fsdp": 8, "tensor": 4})
    both = sharding.layouts(mesh, {"data": 2, "fsdp": 4, "tensor": 4})
    assert both["decode"].mesh.devices.shape == (2, 4, 1, 1, 4)


def test_axes_of_a_group():
    mesh = sharding.make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    assert interconnect.axes(mesh, [0, 1]) == "tensor"
    assert interconnect.axes(mesh, [0, 4]) == "fsdp"
    assert interconnect.axes(mesh, [1, 3, 5, 7]) == "fsdp+expert"
