"""Ablations in turn: what has finished is not run again, what failed does not stop the rest, the table's figures."""

import json
import sys

import pytest
from test_walls import ROOT
from tiny_run import make_policy, settings

from r1jax import ablate, hosts


def evaluated(pass_at_1: float, tokens: float = 10.0) -> dict:
    fields = {field: 0.5 for field, _, _ in ablate.MEASURES}
    return {**fields, "pass_at_1": pass_at_1, "mean_completion_tokens": tokens}


def test_rows_have_mean_and_spread_over_seeds_and_the_paired_difference_to_base():
    runs = {
        "base": {0: evaluated(0.5), 1: evaluated(0.7)},
        "no_kl": {0: evaluated(0.6, 20.0), 1: evaluated(0.7, 30.0)},
        "no_std": {1: evaluated(0.4)},
    }
    base, no_kl, no_std = ablate.table(runs)
    assert base["pass_at_1"]["mean"] == pytest.approx(0.6) and base["pass_at_1"]["std"] == pytest.approx(0.02**0.5)
    assert base["pass_at_1_less_base"] is None
    assert no_kl["pass_at_1_less_base"]["mean"] == pytest.approx(0.05)
    assert no_kl["mean_completion_tokens"]["mean"] == 25.0
    assert no_std["pass_at_1"]["std"] is None and no_std["pass_at_1_less_base"]["mean"] == pytest.approx(-0.3)
    lines = ablate.as_text([base, no_kl, no_std]).splitlines()
    assert len({line.index("pass@1") for line in lines[:1]}) == 1 and lines[0].split()[:3] == [
        "ablation",
        "seeds",
        "pass@1",
    ]
    assert "65.0% ± 7.1%" in lines[2] and "+5.0% ± 7.1%" in lines[2] and "-30.0%" in lines[3]


def test_an_update_takes_its_share_of_the_rollout(tmp_path):
    assert ablate.update_s(tmp_path) is None
    rollouts = [(60.0, 1.0, 1.0), (4.0, 2.0, 2.0), (6.0, 2.0, 1.0)]  # the first one compiles
    rows = [
        {"stage": "ppo", "time/update_s": seconds, **({"time/rollout_s": rollout} if i == 0 else {}), "loss/mean": 9.0}
        for rollout, *updates in rollouts
        for i, seconds in enumerate(updates)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ablate.update_s(tmp_path) == (6.0 + 2.0 + 1.0) / 2


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Runs that leave a summary at once; `codes` holds how each is to end."""
    ran, codes = [], {}

    def run_one(words, folder):
        name = folder.parent.name
        ran.append((name, folder.name))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log.txt").write_text(f"r1jax: {name} is over\n")
        if not (code := codes.get(folder.parent.name, 0)):
            (folder / "summary.json").write_text(
                json.dumps({"wall_s": 60.0, "peak_rss_gb": 2.0, "evals": [{}, evaluated(0.5)]})
            )
            (folder / "finished.json").write_text(json.dumps(words[1:]))
        return code

    monkeypatch.setattr(ablate, "run_one", run_one)
    monkeypatch.chdir(ROOT)
    return ran, codes


def words(workdir, *more: str) -> list[str]:
    return ["--config=configs/zero.py", "--ablations=no_kl,no_std", "--seeds=0,1", f"--workdir={workdir}", *more]


def test_finished_runs_are_skipped_and_failed_ones_run_again(fake, tmp_path, capsys):
    ran, codes = fake
    codes["no_kl"] = 1
    assert ablate.main(words(tmp_path)) == 1
    assert ran == [(name, f"seed_{seed}") for seed in (0, 1) for name in ("base", "no_kl", "no_std")]
    assert "no_kl is over" in capsys.readouterr().out
    assert [row["ablation"] for row in json.loads((tmp_path / "ablations.json").read_text())] == ["base", "no_std"]
    codes.clear(), ran.clear()
    assert ablate.main(words(tmp_path)) == 0
    assert ran == [("no_kl", "seed_0"), ("no_kl", "seed_1")]
    rows = json.loads((tmp_path / "ablations.json").read_text())
    assert {row["ablation"]: row["seeds"] for row in rows} == {"base": [0, 1], "no_kl": [0, 1], "no_std": [0, 1]}
    assert (tmp_path / "ablations.txt").read_text() in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds the run of another command"):
        ablate.main(words(tmp_path, "--config.rl.updates=4"))


def test_a_run_that_was_told_to_end_ends_them_all(fake, tmp_path):
    ran, codes = fake
    codes["no_kl"] = hosts.TRY_AGAIN
    assert ablate.main(words(tmp_path)) == hosts.TRY_AGAIN
    assert ran == [("base", "seed_0"), ("no_kl", "seed_0")]


def test_mistakes_are_told_before_anything_runs(fake, tmp_path, capsys):
    ran, _ = fake
    with pytest.raises(SystemExit, match="there is no ablation 'no_klu'; did you mean 'no_kl'"):
        ablate.main(["--config=configs/zero.py", "--ablations=no_klu", f"--workdir={tmp_path}"])
    for wrong, told in (
        ("--seeds=a", "wanted numbers"),
        ("--config.seed=1", "the seed by --seeds"),
        ("-x", "what is -x"),
    ):
        with pytest.raises(SystemExit):
            ablate.main(["--config=configs/zero.py", f"--workdir={tmp_path}", wrong])
        assert told in capsys.readouterr().err
    assert ran == []


@pytest.mark.slow
def test_real_runs_make_a_table(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("XLA_FLAGS", "")
    make_policy(tmp_path / "policy")
    few = settings(tmp_path / "policy", rl__updates=2)
    flags = [f"--config.{key}={value}" for key, value in few.items() if key != "grpo.kl_coef"]
    out = tmp_path / "out"
    assert ablate.main(["--config=configs/zero.py", "--ablations=no_kl", f"--workdir={out}", *flags]) == 0, sys.stderr
    rows = json.loads((out / "ablations.json").read_text())
    assert [row["ablation"] for row in rows] == ["base", "no_kl"]
    assert rows[1]["mean_completion_tokens"]["mean"] > 0
    assert json.loads((out / "no_kl" / "seed_0" / "config.json").read_text())["grpo"]["kl_coef"] == 0.0
