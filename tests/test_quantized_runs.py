"""Laws of runs whose rollouts are sampled from a quantized policy: training corrects for it, evaluation and what a run
leaves never see it, the planner has it, and what would not correct is refused."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from tiny_run import POLICY, ROOT, STAGE, execute, make_config, make_policy, metrics

from r1jax import run
from r1jax.model import convert
from r1jax.model.quantize import KINDS

SIZES = """
from r1jax import sharding
from r1jax.main import load_config
from r1jax.plan import compare, programs
layouts = sharding.layouts(sharding.make_mesh({"expert": 4, "tensor": 2}))
loops = {}
SHARE = {"deepseek_v3": 0.51, "qwen2_5_7b": 0.58}  # of the 7B policy embedding and head are a seventh
for kind in ("", "int8", "fp8"):
    for model in SHARE:
        config = load_config(f"configs/zero.py:{model}")
        config.sampler.weights = kind
        loop = programs.loop(config, compare.model_config(model), layouts, programs.Load(100, 20))
        loops[model, kind] = {p.name: p for p in loop.programs}
for (model, kind), by_name in loops.items():
    held = programs.device_bytes(by_name["generate"].takes["weights"])
    assert held == programs.device_bytes(by_name["layout"].gives["weights"])
    assert held == programs.device_bytes(by_name["prefill"].takes["weights"])
    whole = programs.device_bytes(loops[model, ""]["generate"].takes["weights"])
    assert 0.5 * whole < held < SHARE[model] * whole if kind else held == whole, (model, kind, held / whole)
    assert ("evaluate" in by_name) == bool(kind)
    if kind:  # evaluation does not quantize, and has to fit
        assert programs.device_bytes(by_name["evaluate"].takes["weights"]) == whole and by_name["evaluate"].calls == 0
"""


def test_the_plan_has_half_the_weights_in_rollouts() -> None:
    # In a process of its own: shapes stand where the checked records want arrays.
    out = subprocess.run([sys.executable, "-c", SIZES], cwd=ROOT, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[pathlib.Path, run.Policy]]:
    """Two rollouts of two updates each, by kind of weights."""
    folder = tmp_path_factory.mktemp("quantized")
    make_policy(folder / "policy", deviation=0.5)  # so sharp that a policy of eight bits is another one
    out = {}
    for kind in ("", *KINDS):
        given = {"rl__updates": 4, "rl__old_logp": "policy", "grpo__importance_cap": 1.001}
        config = make_config(folder / "policy", sampler__weights=kind, **given)
        out[kind] = folder / f"run_{kind}", execute(config, folder / f"run_{kind}")
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_samples_from_the_quantized_policy_and_corrects_for_it(kind: str, runs: dict) -> None:
    (exact, _), (folder, trained) = runs[""], runs[kind]
    for ours, theirs in zip(metrics(folder), metrics(exact), strict=True):
        assert theirs["mismatch/max"] < 1e-4 < 1e-2 < ours["mismatch/mean_abs"]
        # Importance weights above 1.001 are there in every update, not just in a rollout's first.
        assert theirs["importance/truncated_share"] == 0 < ours["importance/truncated_share"] < 1
        assert ours["grad/norm"] > 0 and np.isfinite(ours["loss/mean"])
    assert metrics(folder)[0]["ratio/mean"] == 1
    before, after = (json.loads((one / "summary.json").read_text())["evals"][0] for one in (exact, folder))
    assert before == after, "evaluation measures the policy itself"
    # What is left is the policy, not what sampled for it.
    config, left = convert.load(folder / "models" / STAGE)
    assert config == POLICY
    jax.tree.map(np.testing.assert_array_equal, left, trained.params)
    assert {a.dtype for a in jax.tree.leaves(left)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sampler__weights": "int4"}, "config.sampler.weights is 'int4', wanted int8, fp8, or empty"),
        ({"grpo__importance_cap": None}, "config.sampler.weights is 'int8', .*; set config.grpo.importance_cap"),
        ({"rl__old_logp": "sampler"}, "config.sampler.weights is 'int8', .*; set config.rl.old_logp to 'policy'"),
    ],
)
def test_a_run_that_would_not_correct_is_refused(tmp_path: pathlib.Path, changes: dict[str, Any], says: str) -> None:
    make_policy(tmp_path / "policy")
    given = {"sampler__weights": "int8", "rl__old_logp": "policy", **changes}
    with pytest.raises(ValueError, match=says):
        execute(make_config(tmp_path / "policy", **given), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists(), "at the start"
