"""Save, be cut short, restore, continue equals continue, bit for bit: SIGTERM at any move, a full disk, SIGKILL, and
what to do about a damaged checkpoint. `python -m tests.bench.kills` does the same at many random moments."""

import itertools
import json
import os
import random
import shutil
import time
import types

import jax
import optax
import pytest
from tiny import one_device
from tiny_run import STAGE, arguments, command, execute, make_config, make_policy, metrics, outcome, run_main

from r1jax import hosts, loops, minibatches, pipeline, rollout, run, sampler
from r1jax.checkpoint import latest_step
from r1jax.rewards.pool import RewardPool
from r1jax.run import Stopped


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The policy's folder and that of a run which nothing disturbed."""
    made = tmp_path_factory.mktemp("straight")
    make_policy(made / "policy")
    execute(make_config(made / "policy"), made / "run")
    return made / "policy", made / "run"


def at_call(monkeypatch, module, name, number, act):
    """Has `act` done at the given call of a function."""
    function, calls = getattr(module, name), itertools.count(1)

    def counted(*positional, **named):
        if next(calls) == number:
            act()
        return function(*positional, **named)

    monkeypatch.setattr(module, name, counted)


def test_one_copy_of_the_weights_is_trained_and_none_waits_beside_a_checkpoint(straight):
    policy = pipeline.load_policy(make_config(straight[0]), layouts := one_device())
    lies, optimizer = layouts["train"], optax.sgd(1.0)
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(policy.params)]
    state, _ = run.training_state(policy, lies, optimizer, "device", types.SimpleNamespace(latest=lambda: None))
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state["policy"])] == places
    state, _ = run.training_state(policy, lies, optimizer, "device", types.SimpleNamespace(latest=lambda: 2))
    assert state is None and all(leaf.is_deleted() for leaf in jax.tree.leaves(policy.params))


def test_the_reference_is_kept_in_the_compute_dtype(straight, tmp_path):
    config = make_config(straight[0], model__compute_dtype="bfloat16", rl__updates=2, eval__problems=0)
    execute(config, tmp_path)
    manifest = tmp_path / "checkpoints" / STAGE / "2" / "manifest-00000-of-00001.json"
    kept = json.loads(manifest.read_text())["arrays"]
    kinds = {name: kind.partition("[")[0] for name, kind in kept.items() if name.startswith("reference.")}
    assert {name for name, kind in kinds.items() if kind != "bfloat16"} == {
        "reference.moe.mlp.router", "reference.moe.mlp.router_bias",
    }  # fmt: skip
    assert all(kind.startswith("float32") for name, kind in kept.items() if name.startswith("policy."))
    shutil.rmtree(tmp_path / "models")
    config.rl.updates = 4
    execute(config, tmp_path)  # goes on with it
    assert latest_step(tmp_path / "checkpoints" / STAGE) == 4


def test_a_run_cut_short_at_every_move_ends_like_one_that_was_not(straight, tmp_path):
    policy, undisturbed = straight
    config = make_config(policy)
    assert [record["step"] for record in metrics(undisturbed)] == [1, 2, 3, 4, 5, 6]

    # An evaluation samples 3 problems 4 times, a rollout 4 prompts 4 times; a rollout is two updates.
    for module, name, number, saved in (
        (rollout, "completion_text", 2, 0),  # in the base's evaluation
        (rollout, "completion_text", 12 + 7, 0),  # in the sampling of rollout 0
        (loops, "rollout_metrics", 1, 0),  # between its sampling and its first update
        (minibatches, "pack", 2, 0),
        (loops, "update_metrics", 1, 2),  # after the first of the two updates of rollout 0
        (rollout, "completion_text", 16 + 3, 4),  # in the sampling of rollout 2, after rollout 1
    ):
        stop = hosts.Stop()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
            at_call(patch, module, name, number, lambda stop=stop: setattr(stop, "requested", True))
            execute(config, tmp_path, stop)
        assert latest_step(tmp_path / "checkpoints" / STAGE) == saved
        assert [record["step"] for record in metrics(tmp_path)] == list(range(1, saved + 1))
        assert not (tmp_path / "models").exists()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
        with pytest.raises(OSError, match=r"step 6 could not be written .* 0.000 GB are free.* continue from step 4"):
            execute(config, tmp_path)
    assert latest_step(tmp_path / "checkpoints" / STAGE) == 4

    execute(config, tmp_path)
    assert outcome(tmp_path) == outcome(undisturbed)


def test_a_signal_while_tokens_are_drawn_waits_for_no_completion_and_no_grade(straight, tmp_path, monkeypatch):
    stop, waited = hosts.Stop(), []
    at_call(monkeypatch, sampler._Loop, "_generate", 1, lambda: setattr(stop, "requested", True))
    monkeypatch.setattr(rollout, "completion_text", lambda *_: waited.append("completion") or "")
    monkeypatch.setattr(RewardPool, "drain", lambda _: waited.append("grade") or [])
    with pytest.raises(Stopped):
        execute(make_config(straight[0], eval__problems=0), tmp_path, stop)
    assert not waited and latest_step(tmp_path / "checkpoints" / STAGE) == 0


@pytest.mark.slow
def test_a_run_killed_at_a_random_moment_ends_like_one_that_was_not(tmp_path):
    make_policy(tmp_path / "policy")
    # Not the run of `straight`: a process with eight devices splits its sums in another way.
    undisturbed, killed = (arguments(tmp_path / "policy", tmp_path / name) for name in ("undisturbed", "killed"))
    code, text = run_main(*undisturbed)
    assert code == 0, text
    steps, wait_s = random.randrange(6), random.random()
    first = command(*killed)
    while len(metrics(tmp_path / "killed")) < steps and first.poll() is None:
        time.sleep(0.02)
    time.sleep(wait_s)
    first.kill()
    first.communicate()
    code, text = run_main(*killed)
    assert code == 0, text
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "undisturbed"), f"{wait_s:.3f} s after step {steps}"


def test_of_a_truncated_checkpoint_the_last_good_one_is_named_and_the_run_goes_on_from_there(straight, tmp_path):
    policy, undisturbed = straight
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    saved = tmp_path / "checkpoints" / STAGE
    victim = max((saved / "6" / "arrays").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    os.truncate(victim, victim.stat().st_size // 2)
    code, text = run_main(*arguments(policy, tmp_path))
    last = text.splitlines()[-1]
    assert code == 1 and "Traceback" not in text
    assert last.startswith(f"r1jax: {victim} is damaged: {victim.stat().st_size} bytes, wanted")
    assert last.endswith(f"The last good one is step 4; to continue from it, delete {saved / '6'}")
    shutil.rmtree(saved / "6")
    execute(make_config(policy), tmp_path)
    assert outcome(tmp_path) == outcome(undisturbed)
