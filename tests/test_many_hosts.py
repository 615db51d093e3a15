"""Real processes as hosts: two and four train as one does, a dead or stalled one does not hang the others, and the run
goes on from what they saved. `python -m tests.bench.host_kills` kills at many more moments."""

import json
import pathlib
import re
import signal
import time

import numpy as np
import pytest
from many_hosts import MOVES, Ended, run, start, wait
from safetensors.numpy import load
from tiny_run import STAGE, arguments, execute, make_config, make_policy, metrics, outcome

from r1jax.checkpoint import latest_step


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    made = tmp_path_factory.mktemp("policy")
    make_policy(made)
    return made


def all_well(ends: list[Ended]) -> None:
    assert [end.code for end in ends] == [0] * len(ends), "\n".join(end.text for end in ends)


def weights(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    return load((workdir / "models" / STAGE / "model.safetensors").read_bytes())


def same_run(one: pathlib.Path, other: pathlib.Path) -> None:
    """The same tokens, grades and evaluations; weights and metrics to 1e-4."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=1e-4, err_msg=name)
    assert outcome(one)["evals"] == outcome(other)["evals"]
    for x, y in zip(metrics(one), metrics(other), strict=True):
        assert x.keys() == y.keys()
        for key in x.keys() - {"stage"}:
            assert x[key] == pytest.approx(y[key], rel=1e-3, abs=1e-4), key
    files = sorted(path.name for path in (one / "rollouts").iterdir())
    assert files == sorted(path.name for path in (other / "rollouts").iterdir())
    for file in files:
        rows = [(folder / "rollouts" / file).read_text().splitlines() for folder in (one, other)]
        for x, y in zip(*(map(json.loads, lines) for lines in rows), strict=True):
            x, y = ({k: v for k, v in row.items() if k not in ("logp", "advantage")} for row in (x, y))
            assert x == y


def test_two_hosts_train_as_one_does(policy, tmp_path):
    few = {"rl__updates": 2, "eval__problems": 0}
    all_well(run(2, arguments(policy, tmp_path / "two", **few), devices=2))
    execute(make_config(policy, **few), tmp_path / "one")
    same_run(tmp_path / "one", tmp_path / "two")


def test_hosts_of_different_configs_are_refused_at_the_start(policy, tmp_path):
    words = arguments(policy, tmp_path / "run")
    for end in run(2, words, devices=2, timeout_s=300, R1JAX_FLAG="1|--config.rl.group_size=2"):
        assert end.code == 1 and "Traceback" not in end.text
        assert re.search(
            r"r1jax: host 1 of 2 .* disagrees with host 0 .*: config.rl.group_size is 2 there, 4", end.text
        )
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_four_hosts_train_as_one_does(policy, tmp_path):
    all_well(run(4, arguments(policy, tmp_path / "four")))
    execute(make_config(policy), tmp_path / "one")
    same_run(tmp_path / "one", tmp_path / "four")


@pytest.mark.slow
def test_stalled_grading_on_one_host_costs_its_completions_only(policy, tmp_path):
    rewards = {"rewards": {"patient": 1.0}, "reward_paths": {"patient": f"{policy}/rewards.py:patient"}}
    limits = {"grading__workers": 1, "grading__timeout_s": 1.0, "rl__updates": 2, "eval__problems": 0}
    ends = run(2, arguments(policy, tmp_path, **rewards, **limits), devices=2, R1JAX_STALL="1|3")
    all_well(ends)
    assert metrics(tmp_path)[0]["grading/timeout_share"] == pytest.approx(3 / 16)
    assert metrics(tmp_path)[0]["reward/mean"] == pytest.approx(13 / 16)


@pytest.fixture(scope="module")
def straight(policy, tmp_path_factory):
    """Four hosts that nothing disturbed."""
    made = tmp_path_factory.mktemp("straight")
    all_well(run(4, arguments(policy, made)))
    return made


@pytest.mark.slow
def test_killed_in_any_move_all_exit_and_the_next_run_goes_on(policy, straight, tmp_path):
    for victim, move in enumerate(MOVES):
        ends = run(4, arguments(policy, tmp_path), R1JAX_DIE=f"{victim}|{move}:2:0.01")
        assert ends[victim].code == -9
        last_s = max(end.at_s for end in ends)
        assert last_s - ends[victim].at_s < 60, move
        for end in ends[:victim] + ends[victim + 1 :]:
            assert f"host {victim} of 4" in end.text and "died" in end.text, end.text
    all_well(run(4, arguments(policy, tmp_path)))
    assert outcome(tmp_path) == outcome(straight)


@pytest.mark.slow
def test_a_signal_to_one_host_saves_on_all_and_two_hosts_or_another_mesh_go_on(policy, straight, tmp_path):
    hosts = start(4, arguments(policy, tmp_path))
    until_s = time.monotonic() + 400
    while not metrics(tmp_path) and time.monotonic() < until_s:
        time.sleep(0.05)
    hosts[2].send_signal(signal.SIGTERM)
    ends = wait(hosts)
    assert [end.code for end in ends] == [75] * 4, "\n".join(end.text for end in ends)
    saved = latest_step(tmp_path / "checkpoints" / STAGE)
    assert saved == metrics(tmp_path)[-1]["step"] > 0
    assert len(list((tmp_path / "checkpoints" / STAGE / str(saved)).glob("manifest-*-of-00004.json"))) == 4
    mesh = {"mesh__data": 1, "mesh__fsdp": 2, "mesh__tensor": 2}
    all_well(run(2, arguments(policy, tmp_path, **mesh)))
    same_run(straight, tmp_path)
