"""Laws of the planner: what it reads in a program's text, what it makes of it, and what it says to wrong input."""

import pathlib
import types

import numpy as np
import pytest
from slices import slice_of
from tiny import DEEPSEEK, QWEN, QWEN_MOE

from r1jax import flops, sharding
from r1jax.plan import compare, estimate, hlo, interconnect, layout, topology

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v9:4x4", "wanted one of v4:AxBxC"),
        ("v5e:4x4x4", "torus of 2 dimensions"),
        ("v5p:8x8", "torus of 3 dimensions"),
        ("v5p", "wanted one of"),
    ],
)
def test_an_unknown_topology_lists_the_known(name, said):
    with pytest.raises(ValueError, match=said):
        topology.parse(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fspd4", "did you mean fsdp"),
        ("fsdp4-tensor8", "is 32, but the topology has 16 devices"),
        ("fsdp4-fsdp4", "each once"),
        ("fsdp16/expert4", "is 4, but"),
        ("fsdp16/fsdp16/fsdp16", "TRAIN/DECODE"),
        ("pp16", r"no axis with its size\. Wanted some of data"),
    ],
)
def test_a_wrong_layout_says_what_is_wrong(name, said):
    with pytest.raises(ValueError, match=said):
        layout.parse(name, 16)


def test_a_layout_may_differ_between_the_phases():
    assert layout.parse("fsdp4-tensor4", 16) == ({"fsdp": 4, "tensor": 4},) * 2
    assert layout.parse("fsdp16/data2-tensor8", 16) == ({"fsdp": 16}, {"data": 2, "tensor": 8})
    assert layout.spell({"tensor": 8, "data": 2, "expert": 1}) == "data2-tensor8"


def test_decoding_takes_the_devices_of_training_in_their_order():
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 4})
    both = sharding.layouts(mesh, {"data": 4, "fsdp": 0, "expert": 0, "context": 0, "tensor": 2})
    assert list(both["decode"].mesh.devices.flat) == list(both["train"].mesh.devices.flat)
    assert both["decode"].mesh.shape["data"] == 4 and both["train"].mesh.shape["fsdp"] == 2
    with pytest.raises(ValueError, match="config.decode_mesh"):
        sharding.layouts(mesh, {"data": 3})


def test_active_weights_are_the_published_ones():
    models = {name: compare.model_config(name) for name in ("deepseek_v3", "deepseek_v2_lite", "qwen3_30b_a3b")}
    # Published as 37B (with the embedding's 0.9B), 2.4B and 3.3B with 2 x 0.3B of embedding and head.
    assert flops.active_weights(models["deepseek_v3"]) == pytest.approx(36.6e9, rel=0.01)
    assert flops.active_weights(models["deepseek_v2_lite"]) == pytest.approx(2.4e9, rel=0.06)
    assert flops.active_weights(models["qwen3_30b_a3b"]) == pytest.approx(3.0e9, rel=0.03)


@pytest.mark.parametrize("config", [QWEN, QWEN_MOE, DEEPSEEK], ids=["dense", "moe", "mla"])
def test_operations_are_those_of_the_model(config):
    # One token more costs two operations for each of its weights; one key more the products with it in every layer.
    keyless = flops.forward(config, 1, 0)
    assert keyless == 2 * flops.active_weights(config)
    heads = config.num_hidden_layers * config.num_attention_heads
    width = 6 + 4 + 5 if config.attention == "mla" else 2 * config.head_dim
    assert flops.forward(config, 3, 10) == 3 * (keyless + 10 * 2 * heads * width)


def test_iota_groups_are_read_as_listed_ones():
    assert hlo.groups(", replica_groups={{0,1},{2,3}}, x") == [[0, 1], [2, 3]]
    assert hlo.groups(", replica_groups=[2,2]<=[4]") == [[0, 1], [2, 3]]
    assert hlo.groups(", replica_groups=[2,2]<=[2,2]T(1,0)") == [[0, 2], [1, 3]]
    assert hlo.groups(", source_target_pairs={{0,1},{1,0}}, x") == [[0, 1], [1, 0]]
    order = np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1).reshape(4, 6)
    assert hlo.groups("replica_groups=[4,6]<=[2,3,4]T(2,0,1)") == order.tolist()


def test_groups_along_the_axes_of_a_mesh():
    assert hlo.groups(", replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, x") == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert hlo.groups(", replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0','axis_1'}") == [[0, 1, 2, 3]]
    turned = hlo.groups(", replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}, y")
    assert turned == [[0, 2, 4, 6], [1, 3, 5, 7]]
    # A part of an axis: of its eight, pairs that are two apart.
    parts = hlo.groups(", replica_groups=mesh['axis_0'=8] {'axis_0':(2)2}")
    assert parts == [[0, 2], [1, 3], [4, 6], [5, 7]]
    with pytest.raises(ValueError, match="not understood"):
        hlo.groups(", replica_groups=rings(3)")


def test_sizes_of_types():
    assert hlo.shape_bytes("(bf16[2,3]{1,0:T(8,128)(2,1)}, f32[], s4[8])") == [12, 4, 4]
    assert hlo.shape_bytes("f8e4m3fn[10]") == [10] and hlo.shape_bytes("pred[3]{0}") == [3]


# A loop of eight layers by whose text one sees what counts: 8 x (1503 cycles beside a gather, a kernel, a reduction).
SMALL = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

%fused (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  ROOT %inside = bf16[8,128]{1,0} add(%p, %p), backend_config={"estimated_cycles":"999999"}
}

%body (arg: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %arg = (s32[], /*index=1*/bf16[8,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = bf16[8,128]{1,0} get-tuple-element(%arg), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %start = (bf16[8,128]{1,0}, bf16[32,128]{1,0}) all-gather-start(%x), replica_groups=[1,4]<=[4], dimensions={0}
  %work = bf16[8,128]{1,0} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="(b"},\
 backend_config={"estimated_cycles":"1503"}
  %done = bf16[32,128]{1,0} all-gather-done(%start)
  %sum = bf16[8,128]{1,0} all-reduce(%work), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %out = (s32[], bf16[8,128]{1,0}) tuple(%next, %sum)
}

%condition (arg: (s32[], bf16[8,128])) -> pred[] {
  %carry = (s32[], bf16[8,128]{1,0}) parameter(0)
  %at = s32[] get-tuple-element(%carry), index=0
  %limit = s32[] constant(8)
  ROOT %less = pred[] compare(%at, %limit), direction=LT
}

ENTRY %main (x: bf16[8,128]) -> (s32[], bf16[8,128]) {
  %x.1 = bf16[8,128]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start.1 = (s32[], bf16[8,128]{1,0}) tuple(%zero, %x.1)
  ROOT %loop = (s32[], bf16[8,128]{1,0}) while(%start.1), condition=%condition, body=%body
}
"""


def four() -> tuple[topology.Topology, types.SimpleNamespace]:
    slice_ = slice_of("v5e:2x2")
    names = ("data", "fsdp", "expert", "context", "tensor")
    shape = dict(zip(names, (1, 2, 1, 1, 2), strict=True))
    return slice_, types.SimpleNamespace(devices=np.array(slice_.devices, object), shape=shape, axis_names=names)


def test_a_loop_costs_its_trips_and_a_fusion_only_itself():
    cost = estimate.cost(SMALL, *four(), open_trips=3)
    assert cost.compute_s == pytest.approx(8 * 1503 / 1.503e9)
    assert cost.moved == {("all-gather", "fsdp+tensor"): 8 * 32 * 128 * 2, ("all-reduce", "tensor"): 8 * 8 * 128 * 2}


def test_what_runs_beside_compute_costs_only_the_rest():
    slice_, mesh = four()
    cost = estimate.cost(SMALL, slice_, mesh, open_trips=3)
    gather, reduction = cost.wire["all-gather", "fsdp+tensor"] / 8, cost.wire["all-reduce", "tensor"] / 8
    assert cost.seconds == pytest.approx(8 * (max(gather, 1e-6) + reduction))
    alone = estimate.cost(SMALL.replace("%done = ", "%late = ").replace("all-gather-done", "copy"), slice_, mesh, 3)
    assert alone.seconds <= cost.seconds


def test_a_loop_of_unknown_length_runs_as_often_as_the_program_says():
    unknown = SMALL.replace("%limit = s32[] constant(8)", "%limit = s32[] get-tuple-element(%carry), index=0")
    assert estimate.cost(unknown, *four(), open_trips=3).compute_s == pytest.approx(3 * 1e-6)


def test_a_loop_may_step_by_two():
    by_two = SMALL.replace("%one = s32[] constant(1)", "%one = s32[] constant(2)")
    assert estimate.cost(by_two, *four(), open_trips=3).compute_s == pytest.approx(4 * 1e-6)
    # Of what it adds there may be copies in another memory.
    copied = SMALL.replace("add(%i, %one)", "add(%at_hand, %again)").replace(
        "  %next", "  %at_hand = s32[] copy(%i)\n  %again = s32[] copy(%one)\n  %next"
    )
    assert estimate.cost(copied, *four(), open_trips=3).compute_s == pytest.approx(8 * 1e-6)


def test_handles_of_an_exchange_do_not_travel():
    text = SMALL.replace(
        "(bf16[8,128]{1,0}, bf16[32,128]{1,0}) all-gather-start(",
        "((bf16[8,128]{1,0}), bf16[8,128]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) all-to-all-start(",
    ).replace("all-gather-done", "all-to-all-done")
    assert estimate.cost(text, *four(), open_trips=3).moved["all-to-all", "fsdp+tensor"] == 8 * 8 * 128 * 2


def test_a_gather_of_two_arrays_gives_both():
    text = SMALL.replace(
        "(bf16[8,128]{1,0}, bf16[32,128]{1,0}) all-gather-start(%x)",
        "((bf16[8,128]{1,0}, f32[8]{0}), (bf16[32,128]{1,0}, f32[32]{0})) all-gather-start(%x, %y)",
    )
    moved = estimate.cost(text, *four(), open_trips=3).moved
    assert moved["all-gather", "fsdp+tensor"] == 8 * (32 * 128 * 2 + 32 * 4)


def test_a_shift_in_which_all_stay_costs_nothing():
    # As the compiler writes it for one of two slices, of which the other has something to send.
    text = SMALL.replace(
        "all-reduce(%work), replica_groups={{0,1},{2,3}}, to_apply=%add",
        "collective-permute(%work), source_target_pairs={{0,0},{3,3}}",
    )
    moved = estimate.cost(text, *four(), open_trips=3).moved
    assert not moved.get(("collective-permute", ""))


def test_further_rounds_of_an_exchange_cost_nothing():
    named = SMALL.replace("body=%body", 'body=%body, metadata={op_name="jit(step)/further_rounds/while"}')
    assert estimate.cost(named, *four(), open_trips=3).seconds == 0


def test_a_reduce_scatter_may_hide_in_a_fusion():
    hidden = SMALL.replace(
        "ROOT %inside = bf16[8,128]{1,0} add(%p, %p)",
        "%all = bf16[8,128]{1,0} all-reduce(%p), replica_groups={{0,1},{2,3}}, to_apply=%add\n"
        "  ROOT %inside = bf16[4,128]{1,0} dynamic-slice(%all)",
    )
    moved = estimate.cost(hidden, *four(), open_trips=3).moved
    assert moved["reduce-scatter", "tensor"] == 8 * 8 * 128 * 2


def test_a_chain_of_fusions_repeats_one_collective():
    # As the compiler writes it: each fusion of a chain has the gather in it, from the one that starts it to the last.
    chained = SMALL.replace(
        "ROOT %inside = bf16[8,128]{1,0} add(%p, %p)",
        "%all = bf16[3200000,128]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=2] "
        "{'axis_1'}, frontend_attributes={chain_id=\"0\"}\n  ROOT %inside = bf16[8,128]{1,0} add(%p, %p)",
    ).replace(
        "%sum =",
        '%more = bf16[8,128]{1,0} fusion(%x), calls=%fused, backend_config={"estimated_cycles":"1503"}\n  %sum =',
    )
    slice_, mesh = four()
    cost = estimate.cost(chained, slice_, mesh, open_trips=3)
    size = 3_200_000 * 128 * 2
    assert cost.moved["all-gather", "tensor"] == 8 * size and cost.compute_s == pytest.approx(16e-6)
    wire = interconnect.seconds(slice_, "all-gather", size, slice_.devices[:2])
    assert cost.seconds == pytest.approx(8 * (wire + cost.wire["all-reduce", "tensor"] / 8), rel=0.01)


def two_slices() -> tuple[str, topology.Topology, types.SimpleNamespace]:
    """What the compiler made of the gradient of (tanh(x @ w) ** 2).mean(), w float32 [256, 512]; data2-fsdp4."""
    slices = slice_of("2*v5e:2x2")
    shape = dict(zip(sharding.AXES, (2, 4, 1, 1, 1), strict=True))
    mesh = types.SimpleNamespace(devices=np.array(slices.devices, object), shape=shape, axis_names=sharding.AXES)
    return (ROOT / "tests" / "data" / "two_slices.hlo").read_text(), slices, mesh


def test_a_sum_over_slices_costs_the_data_centres_network():
    text, slices, mesh = two_slices()
    cost = estimate.cost(text, slices, mesh, 1)
    part = 256 * 512 * 4 / 4  # what a device has of the gradient, once it is summed within its slice
    assert cost.moved["all-reduce", "data"] == part
    assert cost.wire["all-reduce", "data"] == part / slices.chip.dcn
    assert {axes for _, axes in cost.moved} == {"data", "fsdp"}
    assert part / slices.chip.dcn < cost.seconds == pytest.approx(cost.compute_s + cost.wire_s, rel=0.01)
    # What another slice is to send is waited for where it is used, and not before.
    send, recv = (next(line for line in text.splitlines() if f" %{name} = " in line) for name in ("send", "recv"))
    early = text.replace(f"{recv}\n", "").replace(send, f"{recv}\n{send}")
    work = (
        '  %work = f32[] fusion(%bitcast.1), calls=%none, backend_config={"estimated_cycles":"15030"}\n  %send-done ='
    )
    beside = estimate.cost(early.replace("  %send-done =", work), slices, mesh, 1)
    assert beside.seconds == pytest.approx(cost.seconds) and beside.compute_s == pytest.approx(cost.compute_s + 1e-5)


def test_a_kernel_without_an_estimate_is_named():
    kernel = '  %k = bf16[8,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"'
    text = SMALL.replace("  %done", f"{kernel}\n  %done")
    assert estimate.cost(text, *four(), open_trips=3).unpriced == 1
    priced = text.replace(
        '"tpu_custom_call"',
        '"tpu_custom_call", backend_config={"cost_estimate":{"flops":985000000,"bytes_accessed":8}}',
    )
    cost = estimate.cost(priced, *four(), open_trips=3)
    assert cost.unpriced == 0 and cost.kernel_s == pytest.approx(8 * 985e6 / (estimate.KERNEL_COMPUTE * 197e12))
    grouped = priced.replace("backend_config={", 'metadata={op_name="ragged-dot-none"}, backend_config={')
    half = estimate.cost(grouped, *four(), 3, {"attention": 1.0, "grouped": 0.5})
    assert half.kernel_s == pytest.approx(cost.kernel_s / 2)
    # Fewer rows than there is room for are fewer operations; the experts' weights are read all the same. Of attention,
    # pairs of blocks are skipped with what they would have read.
    reads = grouped.replace('"bytes_accessed":8', '"bytes_accessed":810000000')
    half = estimate.cost(reads, *four(), 3, {"attention": 1.0, "grouped": 0.5})
    assert half.kernel_s == pytest.approx(8 * 1e-3 / estimate.KERNEL_MEMORY)
    half = estimate.cost(reads.replace("ragged-dot-none", "/forward_kernel/"), *four(), 3, {"attention": 0.5})
    assert half.kernel_s == pytest.approx(4 * 1e-3 / estimate.KERNEL_MEMORY)
    assert estimate.cost(text.replace("%k =", "%ragged-dot-metadata.1 ="), *four(), open_trips=3).unpriced == 0
