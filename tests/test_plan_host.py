"""Laws of the planner for what lies in host memory: counted apart, timed, and named where something does not fit."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from slices import slice_of
from test_plan_layouts import SMALL, a_plan, a_row, four

from r1jax import sharding
from r1jax.plan import account, estimate, programs, table

ROOT = pathlib.Path(__file__).resolve().parent.parent


def shape_on(memory: str, n: int) -> jax.ShapeDtypeStruct:
    lies = sharding.in_memory(jax.sharding.SingleDeviceSharding(jax.devices()[0]), memory, "optim.moments_on")
    return jax.ShapeDtypeStruct((n,), np.float32, sharding=lies)


def compiled(**spent: int) -> types.SimpleNamespace:
    """What the compiler gives: the peak of 1,000 bytes has the host's arguments in it, written in place."""
    sizes = {"peak_memory_in_bytes": 1000, "host_argument_size_in_bytes": 400, "host_output_size_in_bytes": 400,
             "host_alias_size_in_bytes": 400, "host_temp_size_in_bytes": 0, **spent}  # fmt: skip
    return types.SimpleNamespace(
        memory_analysis=lambda: types.SimpleNamespace(**sizes), as_text=lambda: SMALL, output_shardings=None
    )


def update(**more: object) -> programs.Program:
    """Parameters of 80 bytes and moments of 400 in host memory, the reference beside them there."""
    fields = {
        "takes": {"parameters": shape_on("device", 20), "optimizer": [shape_on("host", 100), shape_on("device", 1)]},
        "beside": {"reference": shape_on("host", 20)}, "hauled": 2 * 400.0, **more,
    }  # fmt: skip
    lower = types.SimpleNamespace(compile=lambda **options: compiled())
    return programs.Program("update", lambda done: lower, calls=1.0, trips=3, flops=1.0, tokens=1.0, **fields)


def test_host_memory_is_counted_apart_and_the_way_there_is_timed():
    slice_, mesh = four()
    mesh.size = 4
    row = account.make_row("fsdp4", update(), slice_, mesh, {}, account.How())
    assert row.host == {"optimizer": 400, "reference": 80}
    # Of the peak of 1,000 bytes 400 lie on the host, and 84 of the rest are arguments.
    assert row.hbm == {"parameters": 80, "optimizer": 4, "reference": 0, "activations": 1000 - 400 - 84}
    without = estimate.cost(SMALL, slice_, mesh, 3)
    assert row.cost.host_s == pytest.approx(800 / 1.5e10)
    assert row.est_s == pytest.approx(without.seconds + 800 / 1.5e10)


def test_a_table_and_its_json_name_what_lies_in_host_memory():
    slice_ = slice_of("v5e:2x2")
    cost = estimate.Cost(seconds=2.0, compute_s=1.0, host_s=0.5)
    plan = a_plan("fsdp4", 1.0, a_row(host={"optimizer": 9e9}, cost=cost), a_row(program="generate"))
    said = table.text("title", [plan], slice_, [])
    assert [line.split() for line in said.splitlines() if "in host memory" in line or "9.00" in line] == [
        "GB a device in host memory optimizer moved in a call, estimated".split(),
        ["update", "9.00", "500", "ms"],
    ]
    away, none, _ = json.loads(table.as_json("title", [plan], slice_, []))
    assert (away["host_gb_by_kind"], away["host_s"], none["host_gb_by_kind"]) == ({"optimizer": 9.0}, 0.5, {})
    assert away["hbm_gb"] == 5.0
    assert "host memory" not in table.text("title", [a_plan("fsdp4", 1.0, a_row())], slice_, [])


def test_what_does_not_fit_is_told_what_could_go_to_host_memory():
    large = a_row(hbm={"activations": 9e9, "gradients": 8e9, "optimizer": 4e9, "reference": 2e9}, fits=False)
    said = account.remedy(large, 16e9)
    assert said.endswith("; to host memory could go: optimizer 4.0 GB (optim.moments_on=host), "
                         "reference 2.0 GB (rl.reference_on=host)")  # fmt: skip
    gone = dataclasses.replace(large, hbm={**large.hbm, "optimizer": 4.0}, host={"optimizer": 4e9})
    assert account.remedy(gone, 16e9).endswith("; to host memory could go: reference 2.0 GB (rl.reference_on=host)")
    assert "host memory" not in account.remedy(dataclasses.replace(gone, hbm={"cache": 20e9, "weights": 1e9}), 16e9)


LOOP = """
from r1jax.main import load_config
from r1jax import sharding
from r1jax.plan import compare, programs
config, model = load_config("configs/zero.py"), compare.model_config("tiny")
config.optim.moments_on = config.rl.reference_on = "host"
layouts = sharding.layouts(sharding.make_mesh({"fsdp": 8}))
by_name = {p.name: p for p in programs.loop(config, model, layouts, programs.Load(100, 20)).programs}
host, device = programs.host_bytes, programs.device_bytes
for name, p in by_name.items():
    held = [tree for trees in (p.takes, p.beside) for kind, tree in trees.items() if kind in ("optimizer", "reference")]
    weights = device(by_name["update"].takes["parameters"])
    assert abs(sum(map(host, held)) / weights - 3) < 0.01, name  # two moments and the reference
    assert abs(sum(map(device, held)) / weights - (name == "score")) < 0.01, name
    assert host([p.takes.get("weights"), p.takes.get("parameters"), p.takes.get("cache")]) == 0, name
# Moments go there and back at every update, the reference comes once a rollout; nothing else moves.
assert by_name["update"].hauled == 2 * host(by_name["update"].takes["optimizer"]) > 0
score = by_name["score"]
assert abs(score.hauled * score.calls / host(score.beside["reference"]) - 1) < 1e-6
assert not any(p.hauled for name, p in by_name.items() if name not in ("score", "update"))
"""


def test_the_loop_keeps_moments_and_reference_on_the_host():
    out = subprocess.run([sys.executable, "-c", LOOP], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


# A stack of eight layers on a v5e: gradients fill the chip while the moments are away.
STEP = """
from functools import partial
import jax, jax.numpy as jnp
from r1jax import optim, sharding
from r1jax.plan.topology import open_topology
mesh = sharding.make_mesh({"fsdp": 4}, list(open_topology("v5e:2x2").devices))
layout = sharding.layouts(mesh)["train"]
lies = {"moe": {"q": layout.sharding(None, "width", None)}, "embed": layout.sharding(None, "width")}
shapes = {"moe": {"q": (8, 1024, 4096)}, "embed": (4096, 1024)}
params = jax.tree.map(lambda s, l: jax.ShapeDtypeStruct(s, jnp.float32, sharding=l), shapes, lies,
                      is_leaf=lambda s: isinstance(s, tuple))
spent = {}
for where in ("device", "host"):
    optimizer = optim.make_optimizer(optim.OptimConfig(moments_on=where), params)
    like = jax.eval_shape(partial(optim.init, optimizer), params)
    at = optim.state_like(like, sharding.in_memory(lies, where, "optim.moments_on"), layout.sharding())
    state = jax.tree.map(lambda a, l: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=l), like, at)
    step = jax.jit(partial(optim.apply, optimizer), donate_argnums=(0, 1))
    program = step.lower(params, state, params, jax.ShapeDtypeStruct((), jnp.float32)).compile()
    spent[where] = program.memory_analysis()
    assert jax.tree.map(lambda s: s.memory_kind, program.output_shardings[1]) == jax.tree.map(
        lambda s: s.memory_kind, at)
moments, layer = 2 * 4 * 9 * 1024 * 4096 / 4, 2 * 4 * 1024 * 4096 / 4
host, device = spent["host"], spent["device"]
assert device.host_argument_size_in_bytes == 0 and abs(host.host_argument_size_in_bytes / moments - 1) < 0.01
assert host.host_alias_size_in_bytes == host.host_output_size_in_bytes == host.host_argument_size_in_bytes
assert host.host_temp_size_in_bytes == 0
# The compiler's peak has the host's part in it. Left on the device: a layer as it was and as it will be, and the table.
saved = device.peak_memory_in_bytes - (host.peak_memory_in_bytes - host.host_argument_size_in_bytes)
print(moments, saved, layer)
assert saved > moments - 4 * layer, (saved, moments, layer)
"""


@pytest.mark.slow
def test_a_tpu_program_has_room_where_moments_were():
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'r1jax[tpu]'")
    out = subprocess.run([sys.executable, "-c", STEP], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
