"""Which completions and curves of a run are shown: evenly chosen, in order, averaged without bias."""

import json
import math
import pathlib

import numpy as np
import pytest

from r1jax import analyses, curves, report, run_folder


@pytest.mark.parametrize("n", [0, 1, 2, 3, 12, 97])
def test_every_prefix_of_spread_is_even(n: int) -> None:
    order = run_folder.spread(n)
    assert sorted(order) == list(range(n))
    for size in range(2, n + 1):
        gaps = np.diff(sorted(order[:size]))
        assert sorted(order[:2]) == [0, n - 1]
        assert gaps.max() <= 2 * math.ceil((n - 1) / (size - 1)) + 1


def test_a_long_completion_keeps_its_ends_and_their_log_probabilities(tmp_path: pathlib.Path) -> None:
    n = 5_000
    line = {
        "rollout": 0,
        "step": 0,
        "prompt_id": "p",
        "member": 0,
        "completion": "",
        "tokens": [f" {i}" for i in range(n)],
    }
    (tmp_path / "a.jsonl").write_text(json.dumps({**line, "logp": [-i / 100 for i in range(n)]}))
    notes: list[str] = []
    (completion,) = run_folder.sample_completions(tmp_path, notes)["completions"]
    assert completion["length"] == n and any("longer completions" in note for note in notes)
    cut = completion["cut"]
    shown = [*range(cut["at"]), *range(cut["at"] + cut["tokens"], n)]
    assert completion["tokens"] == [f" {i}" for i in shown]
    assert completion["logp"] == [-i for i in shown]


def test_prompts_are_told_apart_by_what_they_do_not_share() -> None:
    template = "Think, then answer. User: Using {} and + - *, make {}. Assistant:"
    prompts = [template.format("3, 5", 16), template.format("3, 7", 26)]
    assert run_folder.prompt_labels(prompts) == ["Using 3, 5 and + - *, make 16", "Using 3, 7 and + - *, make 26"]
    assert run_folder.prompt_labels(["one", "two"]) == ["one", "two"]
    assert run_folder.prompt_labels(["same", "same"]) == ["same", "same"]
    assert run_folder.prompt_labels(["x" * 200])[0].startswith("xxx")


@pytest.mark.parametrize("n", [0, 1, 30, 100])
def test_moving_mean_is_the_mean_of_the_values_around(n: int) -> None:
    y = np.random.default_rng(0).normal(size=n)
    reach = round(n * curves.SMOOTHING) // 2
    wanted = [y[max(i - reach, 0) : i + reach + 1].mean() for i in range(n)]
    np.testing.assert_allclose(curves.moving_mean(y), wanted, rtol=1e-12)


def test_a_long_line_is_averaged_in_bins() -> None:
    records = [{"step": step, "kl/mean": float(step)} for step in range(10 * curves.MAX_POINTS)]
    line = curves.metric_line(records, "kl/mean")
    assert len(line["x"]) == len(line["y"]) == curves.MAX_POINTS
    assert line["x"][:2] == [4.5, 14.5] and line["x"] == line["y"]


def test_levels_are_in_order_of_number() -> None:
    by_level = {level: {"pass_at_1": 0.5, "mean_completion_tokens": 10.0} for level in ("10", "2", "hard", "1")}
    bars = analyses.level_charts([{"by_level": by_level}])[0]["bars"]
    assert [bar["label"] for bar in bars] == ["measured"] and bars[0]["x"] == ["1", "2", "10", "hard"]


def test_votes_stand_against_the_number_of_samples_of_the_first_and_the_last_evaluation() -> None:
    evals = [{"cons_at": {"16": 0.4 + n / 10, "2": 0.2}, "pass_at": {"2": None} if n else {}} for n in range(3)]
    (chart,) = analyses.sample_charts([{"pass_at_1": 0.1}, *evals])
    assert [(line["label"], line["x"]) for line in chart["lines"]] == [
        ("majority of k, before", ["2", "16"]),
        ("majority of k, after", ["2", "16"]),
    ]
    assert chart["says"] == "majority of 16 40.0% → 60.0%"
    assert analyses.sample_charts([{"cons_at": {}}]) == []


def test_a_word_that_rises_late_shows_when_and_one_that_never_comes_is_left_out() -> None:
    late = [{"step": n, "reflective/wait": float(n > 60), "reflective/but": 0.0} for n in range(1, 101)]
    (chart,) = [c for c in curves.run_charts(late, []) if c["title"] == "Reflective words, one by one"]
    assert [line["label"] for line in chart["lines"]] == ["wait"]
    assert chart["says"] == "wait 0 → 1, half of its most at step 61"


def test_operations_are_added_up_by_stage_to_a_step(tmp_path: pathlib.Path) -> None:
    lines = [{"stage": s, "step": n, "compute/flops": 10.0 * n} for s in ("sft", "rl") for n in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 4}]))
    spent = run_folder.read_run(tmp_path).training_flops
    assert (spent("sft"), spent("rl", 2), spent("other"), spent("")) == (60.0, 30.0, 0.0, 0.0)


def test_reward_models_stand_on_the_page_with_what_was_measured_of_them(tmp_path: pathlib.Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"evals": []}))
    assert "Reward models" not in report.render(run_folder.read_run(tmp_path))
    measured = {"eval/accuracy": 0.925, "eval/length_correlation": -0.125, "held_out": 64}
    for stage, model, more in (("prm", "helpful", {}), ("prm", "safe", {"unsafe_share": 0.25}), (".prm.new", "x", {})):
        folder = tmp_path / "models" / stage / model
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps(measured | more))
    page = report.render(run_folder.read_run(tmp_path))
    table = page.partition("<h3>Reward models</h3>")[2].partition("</table>")[0]
    assert table.count("<td>prm</td>") == 2 and all(name in table for name in ("helpful", "safe", "92.5%", "25.0%"))
    assert "0.125" in table and "<td></td>" in table, "no unsafe share of helpfulness"
    (tmp_path / "models" / "prm" / "safe" / "report.json").write_text("{")
    assert any("report.json is not readable" in note for note in run_folder.read_run(tmp_path).notes)
