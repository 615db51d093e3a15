"""Laws of the planner's comparison: what fails costs only itself, what a search tries, and what the tables say."""

import dataclasses
import json
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from slices import slice_of
from test_plan import ROOT, SMALL, four

from r1jax import sharding
from r1jax.model import transformer
from r1jax.plan import account, compare, estimate, layout, programs, schedule, table, topology


def a_row(**changed) -> account.Row:
    wires = {"moved": {("all-reduce", "data"): 0.5e9}, "wire": {("all-reduce", "data"): 0.25}}
    cost = estimate.Cost(seconds=2.0, compute_s=1.0, unpriced=1, **wires)
    fields = {
        "layout": "fsdp4", "program": "update", "calls": 16.0, "trips": 1, "tokens": 1.0, "flops": 1e12, "fits": True,
        "compile_s": 2.0, "hbm": {"parameters": 2e9, "activations": 3e9}, "host": {}, "cost": cost, "mfu": 0.4,
    }  # fmt: skip
    return account.Row(**{**fields, **changed})


def a_plan(layout_name: str, updates_s: float, *rows: account.Row) -> account.Plan:
    return account.Plan(layout_name, rows, 1.0, updates_s, 10.0, 1.0, 16, 2200, 65_536, programs.Load(9.0, 3.0))


def test_rows_of_json_have_the_agreed_keys():
    broken = a_row(cost=None, fits=False, failed="too large")
    failed = account.Plan("tensor4", failed="4 heads do not divide")
    plans = [a_plan("fsdp4", 2.0, a_row(), broken), failed]
    rows = json.loads(table.as_json("title", plans, slice_of("v5e:2x2"), ["note"]))
    keys = {"layout", "program", "hbm_gb", "fits", "est_s", "mfu", "collective_gb", "compile_s"}
    assert all(keys <= row.keys() for row in rows)
    assert [(row["layout"], row["program"]) for row in rows] == [
        *(("fsdp4", "update"), ("fsdp4", "update"), ("fsdp4", "loop"), ("tensor4", "loop"))
    ]
    assert rows[0]["hbm_gb"] == 5.0 and rows[0]["est_s"] == 2.0 and rows[1]["est_s"] is None
    assert rows[0]["unpriced_kernels"] == 1 and rows[0]["wire_s_by_kind"] == {"all-reduce data": 0.25}
    assert rows[3]["failed"] == "4 heads do not divide" and not rows[3]["fits"] and rows[3]["est_s"] is None


def test_a_row_of_json_has_the_whole_loop():
    row = json.loads(table.as_json("title", [a_plan("fsdp4", 2.0, a_row())], slice_of("v5e:2x2"), ["note"]))[-1]
    assert row["program"] == "loop" and row["fits"] and row["hbm_gb"] == 5.0
    assert row["est_s"] == 3.0 and row["rollout_s"] == 1.0 and row["update_s"] == 3 / 16
    assert row["tokens_per_s"] == 10 and row["tokens_per_day"] == 864_000
    assert row["run_updates"] == 2200 and row["run_hours"] == 1.0 and row["chip_hours"] == 4.0
    assert row["collective_gb"] == 16 * 0.5 and row["reported_schedule_chip_hours"] is None
    assert row["about"]["notes"] == ["note"] and row["about"]["chips"] == 4
    assert row["about"]["completion_tokens"] == 9.0 and row["about"]["max_completion_tokens"] == 65_536


def test_hours_are_those_of_the_part_of_the_schedule_with_this_length():
    assert schedule.parts() == {32_768: 8200, 65_536: 2200}
    config = zero("deepseek_v3")
    assert schedule.updates(config.rl) == 8200
    late = zero("deepseek_v3+late_length")
    assert late.rl.max_completion_tokens == 65_536 and schedule.updates(late.rl) == 2200
    assert schedule.updates(zero("qwen2_5_7b").rl) == 10_400  # shorter than any of the report's
    assert schedule.updates(zero().rl) == 76
    long = a_plan("fsdp4:late_length", 2.0, a_row())
    short = dataclasses.replace(long, layout="fsdp4", run_hours=5.0, run_updates=8200, longest=32_768)
    assert schedule.together([short, long]) == {"fsdp4": 6.0} and not schedule.together([short])
    said = table.text("title", [short, long], slice_of("v5e:2x2"), [])
    assert "8,200 updates at up to 32,768 tokens, of the report's 10,400: 5 hours on 4 chips, 20 chip-hours" in said
    assert "fsdp4: the report's whole schedule, 10,400 updates, 6 hours, 24 chip-hours" in said


def test_plans_are_ranked_by_the_time_of_an_update():
    # A rollout for one update is shorter than one for sixteen, and worse.
    short = dataclasses.replace(a_plan("fsdp4:on_policy", 0.5, a_row()), updates=1)
    whole, failed = a_plan("fsdp4", 4.0, a_row()), account.Plan("tensor4", failed="heads")
    assert table.rank([failed, short, whole]) == [whole, short, failed]


def test_what_does_not_fit_ranks_last_and_says_what_to_change():
    slice_ = slice_of("v5e:2x2")
    large = a_row(layout="tensor4", hbm={"cache": 20e9, "weights": 1e9}, fits=False)
    plans = [a_plan("tensor4", 1.0, large), a_plan("fsdp4", 3.0, a_row()), a_plan("data4", 2.0, a_row())]
    assert [p.layout for p in table.rank(plans)] == ["data4", "fsdp4", "tensor4"]
    said = table.text("title", plans, slice_, ["note"])
    assert "tensor4: update needs 21.0 GB a device, 4.1 GB more than the 16.9 GB there are" in said
    assert "fewer sampler.slots" in said
    assert "21.0 GB" in table.page("title", plans, slice_, ["note"])


def test_decoding_is_held_against_the_bandwidth_limit():
    slice_ = slice_of("v5e:2x2")
    row = a_row(program="generate", trips=10, hbm={"weights": 3 * 8.1e8, "cache": 5 * 8.1e8, "optimizer": 9e9})
    said = table.text("title", [a_plan("fsdp4", 1.0, row)], slice_, [])
    assert "generate: 200 ms a token; reading weights and caches takes 8 ms" in said
    assert "4% of it" in said


def a_program(lower) -> programs.Program:
    return programs.Program("update", lower, 1.0, 1, 1e30, 1.0, {}, {})


def test_a_program_that_fails_is_a_row_that_says_why():
    slice_, mesh = four()

    def refuse(done):
        raise RuntimeError("Mosaic failed to compile TPU kernel: bad tiling\nand more")

    row = account.make_row("fsdp4", a_program(refuse), slice_, mesh, {}, account.How())
    assert row.failed == "Mosaic failed to compile TPU kernel: bad tiling" and not row.fits and row.cost is None
    said = table.text("title", [account.Plan("fsdp4", (row,))], slice_, [])
    assert "fsdp4: update does not compile: Mosaic failed" in said


def test_an_estimate_above_the_peak_is_none():
    slice_ = slice_of("v5e:2x2")
    mesh = types.SimpleNamespace(**vars(four()[1]), size=4)
    host = dict.fromkeys(("argument", "output", "alias", "temp"), 0)
    spent = types.SimpleNamespace(peak_memory_in_bytes=8e9, **{f"host_{k}_size_in_bytes": n for k, n in host.items()})
    made = types.SimpleNamespace(as_text=lambda: SMALL, memory_analysis=lambda: spent, output_shardings=None)
    lowered = types.SimpleNamespace(compile=lambda compiler_options: made)
    row = account.make_row("fsdp4", a_program(lambda done: lowered), slice_, mesh, {}, account.How())
    assert row.fits and row.cost is None and "of the peak, so it is wrong" in row.failed
    assert "update: no estimate" in table.text("title", [account.Plan("fsdp4", (row,))], slice_, [])


@pytest.mark.parametrize(
    ("said", "beyond"),
    [
        ("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.", 16.5),
        ("the total memory required for HLO temporaries (361.89G) exceeds available HBM (95.74G).", 361.89),
        ("Mosaic failed to compile TPU kernel", 0.0),
    ],
)
def test_what_the_compiler_says_of_too_large_a_program_is_read(said, beyond):
    assert account._too_large(f"RESOURCE_EXHAUSTED: {said}", 4 * 2.0**30) == pytest.approx(beyond * 2**30)


def zero(model: str = "") -> object:
    from r1jax.main import load_config

    return load_config(f"configs/zero.py{model and ':'}{model}")


def asked(**changed) -> compare.Asked:
    return compare.Asked(
        **{
            "model": "tiny", "topology": "v5e:2x2", "layouts": ("fsdp4",), "is_search": False, "ablations": (),
            "programs": (), "completion_tokens": 100, "prompt_tokens": 20, **changed,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "devices", "wanted"),
    [
        ("deepseek_v3", 1024, "fsdp4-expert16-tensor16"),
        ("qwen3_30b_a3b", 64, "fsdp8-expert8"),
        ("qwen2_5_7b", 16, "fsdp16"),
    ],
)
def test_a_search_tries_layouts_that_divide(model, devices, wanted):
    config = compare.model_config(model)
    found = compare.sensible(config, devices)
    assert wanted in found and len(found) > 2
    for name in found:
        for sizes, rules in zip(layout.parse(name, devices), sharding.PHASES.values(), strict=True):
            mesh = types.SimpleNamespace(shape={axis: sizes.get(axis, 1) for axis in sharding.AXES})
            spread = sharding.Layout(mesh, rules)
            sharding.check_divides(transformer.logical_axes(config), transformer.shapes(config), spread)


def test_a_search_lays_data_over_the_slices():
    found = compare.sensible(compare.model_config("qwen2_5_7b"), 32, slices=2)
    assert "data2-fsdp16" in found and all(name.startswith("data2-") for name in found)
    for part in (part for name in found for part in name.split("/")):
        assert part.startswith("data2-")


def test_a_search_tries_other_kinds_of_layouts_too():
    moe = compare.model_config("qwen3_30b_a3b")
    found = compare.sensible(moe, 4)
    assert "fsdp4" in found and "expert4" in found
    found = compare.sensible(compare.model_config("deepseek_v3"), 1024, longest=32_768)
    assert {"fsdp1024", "fsdp16-expert8-context8", "fsdp4-expert16-tensor16/fsdp4-expert256"} <= {*found}
    assert "fsdp16/fsdp4-tensor4" in compare.sensible(compare.model_config("qwen2_5_7b"), 16)


def test_a_search_that_finds_no_layout_says_why():
    with pytest.raises(ValueError, match=r"no layout fits 11 .*expert11: .* does not divide over 11 .*fsdp11: "):
        compare.sensible(compare.model_config("qwen3_30b_a3b"), 11)


def test_a_search_raises_slots_to_the_devices():
    config = zero("qwen2_5_7b")
    layout_ = sharding.layouts(sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))["decode"]
    assert compare._with_room(config, layout_) == ""
    config.sampler.update({"slots": 12, "prefill_prompts": 2})
    assert compare._with_room(config, layout_) == "sampler.slots=16, sampler.prefill_prompts=4"
    assert config.sampler.slots == 16 and config.sampler.prefill_prompts == 4


def on_eight(monkeypatch, fails=()) -> list:
    """Plans without a compiler, on the eight devices there are; gives what each was made of."""
    made = []
    slice_ = dataclasses.replace(slice_of("v5e:2x4"), devices=tuple(jax.devices()))
    monkeypatch.setattr(compare, "open_topology", lambda name: slice_)

    def loop(config, model, layouts, load):
        if any(layouts["train"].mesh.shape[axis] > 1 for axis in fails):
            raise ValueError("kv_heads of 1 does not divide")
        made.append(config)
        return programs.Loop((), 4, 512, load, 76, config.rl.max_completion_tokens)

    monkeypatch.setattr(compare.programs, "loop", loop)
    monkeypatch.setattr(compare, "make_plan", lambda shown, *rest, **kw: a_plan(shown, 2.0, a_row(layout=shown)))
    return made


def searching(monkeypatch, reads: dict[str, float], updates_s: dict[str, float], too_large: str = "") -> tuple:
    """A search among layouts of eight devices that read so many bytes in decoding and take so long to update.

    Gives what it reports and, in order, what was compiled.
    """
    on_eight(monkeypatch)
    compiled = []

    def loop(config, model, layouts, load):
        lies, size = layouts["decode"].sharding(), int(reads[layout.spell(layouts["train"].mesh.shape)] / 4)
        weights = {"weights": jax.ShapeDtypeStruct((size,), np.float32, sharding=lies)}
        beside = {"optimizer": jax.ShapeDtypeStruct((250_000_000,), np.float32, sharding=lies)}
        rest = {"flops": 1.0, "tokens": 1.0, "takes": weights, "beside": beside}
        each = [programs.Program(name, None, calls=3.0, trips=2, **rest) for name in ("generate", "update")]
        return programs.Loop(tuple(each), 4, 512, load, 76, config.rl.max_completion_tokens)

    def make_plan(shown, *rest, only, known=(), **how):
        compiled.append((shown, only, len(known)))
        rows = [a_row(layout=shown)] if only else [*known, a_row(layout=shown, program="generate")]
        if shown == too_large and not only:
            rows[-1] = dataclasses.replace(rows[-1], fits=False)
        return a_plan(shown, updates_s[shown], *rows)

    monkeypatch.setattr(compare.programs, "loop", loop)
    monkeypatch.setattr(compare, "make_plan", make_plan)
    monkeypatch.setattr(compare, "sensible", lambda *given: [*reads])
    return compare.compare(zero(), asked(layouts=(), is_search=True), lambda line: None), compiled


READS = {
    "tensor8": 20e9, "fsdp8": 9e9, "data8": 8e9, "expert8": 7e9, "context8": 6e9, "fsdp4-tensor2": 5e9,
    "fsdp2-tensor4": 4e9, "fsdp4-expert2": 3e9,
}  # fmt: skip
# The slowest update by far has the least to read; those of two layouts differ by less than what decoding reads.
TAKES_S = dict.fromkeys(READS, 5.0) | {"fsdp4-expert2": 50.0, "data8": 4.99, "context8": 4.0, "expert8": 3.0}


def test_a_search_compiles_few_layouts_and_says_why_not_the_rest(monkeypatch):
    found, compiled = searching(monkeypatch, READS, TAKES_S)
    tried = ["fsdp4-expert2", "fsdp2-tensor4", "fsdp4-tensor2", "context8", "expert8", "data8"]
    assert compiled[: compare.TRIED] == [(name, ("update",), 0) for name in tried]
    assert compiled[compare.TRIED :] == [("expert8", (), 1), ("context8", (), 1)]  # and update not once more
    plans = {plan.layout: plan for plan in found.plans}
    assert [*plans] == [*READS] and [p.layout for p in table.rank(found.plans)][:2] == ["expert8", "context8"]
    said = table.text(found.title, found.plans, found.topology, found.notes)
    assert "tensor8: generate needs 21.0 GB a device, 4.1 GB more than" in said
    assert "generate was not compiled: its arguments and what lies beside them alone do not fit" in said
    # 3 calls of 2 steps, each of 9 GB at 810 GB/s.
    assert "== fsdp8 ==\nnot compiled: a rollout reads weights and caches for 0 s at least, longer than" in said
    assert plans["fsdp8"].least_s == pytest.approx(6 * 9e9 / 8.1e11)
    assert plans["data8"].skipped == "only update was compiled" and not plans["expert8"].skipped
    rows = json.loads(table.as_json(found.title, found.plans, found.topology, found.notes))
    fits = {row["layout"]: row["fits"] for row in rows if row["program"] == "loop"}
    assert (fits["tensor8"], fits["fsdp8"], fits["data8"], fits["expert8"]) == (False, None, True, True)


def test_a_search_goes_on_until_whole_loops_fit(monkeypatch):
    _, compiled = searching(monkeypatch, READS, TAKES_S, too_large="expert8")
    whole = [name for name, only, _ in compiled if not only]
    # With as long an update, the one that decodes faster is next.
    assert whole == ["expert8", "context8", "fsdp2-tensor4"]


def test_a_search_with_programs_compiles_these_alone(monkeypatch):
    on_eight(monkeypatch)
    given = asked(layouts=(), is_search=True, programs=("generate",), ablations=("gather",))
    monkeypatch.setattr(compare, "sensible", lambda *given: ["fsdp8", "tensor8"])
    monkeypatch.setattr(compare, "bound", lambda shown, *rest: account.Plan(shown, least_s=1.0))
    found = compare.compare(zero(), given, lambda line: None)
    assert [p.layout for p in found.plans] == ["fsdp8", "tensor8", "fsdp8:gather", "tensor8:gather"]
    assert not any(p.skipped for p in found.plans)


def test_a_layout_that_cannot_be_does_not_cost_the_others(monkeypatch):
    on_eight(monkeypatch, fails=("tensor",))
    kept = []
    found = compare.compare(zero(), asked(layouts=("tensor8", "fsdp8")), lambda line: None, kept.append)
    assert [plan.failed for plan in found.plans] == ["kv_heads of 1 does not divide", ""]
    assert [len(report.plans) for report in kept] == [1, 2]
    said = table.text(found.title, found.plans, found.topology, found.notes)
    assert "tensor8 ==\nthis layout cannot be: kv_heads of 1" in said and "upper bound" in said
    # What is misspelt is said before anything is planned.
    with pytest.raises(ValueError, match="did you mean fsdp"):
        compare.compare(zero(), asked(layouts=("fsdp8", "fspd8")), lambda line: None, kept.append)
    assert len(kept) == 2


def test_an_ablation_is_planned_beside_the_config(monkeypatch):
    made = on_eight(monkeypatch)
    wanted = {
        "gather": ("model.expert_exchange", "gather"),
        "bf16_moments": ("optim.moments_dtype", "bfloat16"),
        "remat_full": ("model.remat", "full"),
        "late_length": ("rl.max_completion_tokens", 65_536),
    }
    config, how = zero("deepseek_v3"), asked(layouts=("fsdp8",), ablations=tuple(wanted), completion_tokens=0)
    found = compare.compare(config, how, lambda line: None)
    assert [plan.layout for plan in found.plans] == ["fsdp8", *(f"fsdp8:{name}" for name in wanted)]
    flat = [config.to_dict() for config in made]
    for i, (key, value) in enumerate(wanted.values(), 1):
        group, key = key.split(".")
        assert flat[i][group][key] == value != flat[0][group][key]
        assert sum(flat[i][g] != flat[0][g] for g in flat[0]) == 1


def test_a_rollout_is_priced_by_how_far_its_cache_has_grown():
    # Half of the steps over 100 places, half over 200: as one over 150. What waits is drawn over the longest.
    assert programs._fullness([100, 200], 0, 200, 200) == 0.5
    assert programs._fullness([100, 150, 200], 0, 200, 200) == pytest.approx(0.375)
    assert programs._fullness([100, 200], 0, 200, 400) == 0.75
    assert programs._fullness([100], 20, 80, 80) == 1.0


def test_an_unknown_model_lists_the_known(monkeypatch):
    monkeypatch.setattr(compare, "open_topology", slice_of)
    with pytest.raises(ValueError, match=r"--model=tony: wanted one of tiny, .*deepseek_v3"):
        compare.compare(zero(), asked(model="tony"), print)


def test_without_libtpu_the_command_to_install_it_is_named(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape("pip install 'r1jax[tpu]'")):
        topology.open_topology("v5e:2x2")


def test_heads_that_do_not_divide_are_named():
    config, model = zero("qwen2_5_7b"), compare.model_config("qwen2_5_7b")
    layouts = sharding.layouts(sharding.make_mesh({"tensor": 8}))
    with pytest.raises(ValueError, match=r"kv_heads of 4 does not divide over 8 devices; change config.mesh.tensor"):
        programs.loop(config, model, layouts, programs.Load(100, 20))


LOOP = """
from r1jax.main import load_config
from r1jax import sharding
from r1jax.plan import compare, programs
config, model = load_config("configs/zero.py"), compare.model_config("tiny")
config.sampler.prefill_prompts = 64  # of 32 there are: still one call
layouts = sharding.layouts(sharding.make_mesh({"fsdp": 8}))
loop = programs.loop(config, model, layouts, programs.Load(100, 20))
by_name = {p.name: p for p in loop.programs}
names = "layout prefill insert resize generate_short generate score update"
assert " ".join(by_name) == names, [*by_name]
assert by_name["prefill"].calls == by_name["insert"].calls == 1
drawn = by_name["generate_short"].calls + by_name["generate"].calls
assert drawn == 288 / 64 and by_name["generate_short"].flops < by_name["generate"].flops
for name, p in by_name.items():
    assert {"parameters", "optimizer", "reference"} <= {*p.takes, *p.beside}, name
    assert not {*p.takes} & {*p.beside} - {"batch"}, name
# Parameters lie over all devices; the moments are two of them.
sizes = {kind: programs.device_bytes(tree) for kind, tree in by_name["update"].takes.items()}
assert abs(sizes["optimizer"] / sizes["parameters"] - 2) < 0.01, sizes
assert by_name["update"].flops == 3 * by_name["score"].flops
assert loop.completions == 8 * 4 * 16
"""


def test_the_loop_holds_what_lies_beside_each_program():
    # In a process of its own: shapes stand where the checked records want arrays.
    out = subprocess.run([sys.executable, "-c", LOOP], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


@pytest.mark.slow
def test_the_loop_of_a_small_policy_compiles_for_a_tpu(tmp_path):
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'r1jax[tpu]'")
    command = [
        *(sys.executable, "-m", "r1jax.plan", "--topology=v5e:2x2", "--layouts=data4,fsdp2-expert2"),
        *(f"--json={tmp_path / 'rows.json'}", f"--html={tmp_path / 'page.html'}"),
        *("--config.model.compute_dtype=bfloat16", "--config.model.cache_dtype=bfloat16"),
    ]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    rows = [row for row in rows if row["program"] != "loop"]
    assert len(rows) == 16 and all(row["fits"] and 0 < row["hbm_gb"] < 16 and row["est_s"] > 0 for row in rows)
    assert "comparison, best first" in out.stdout and "chip-hours" in out.stdout
