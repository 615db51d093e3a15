"""The report page: complete for a whole run, honest about a broken one, and deaf to whatever completions contain."""

import base64
import gzip
import hashlib
import html.parser
import json
import math
import os
import pathlib
import random
import shutil
import subprocess
import xml.etree.ElementTree
from typing import Any

import numpy as np
import pytest

from r1jax import curves, report, run_folder

# What a policy may write: the end of a script, markup, templates, text that turns around, half a surrogate pair.
HOSTILE = "</script ><script>boom()</script><!-- <img src=x onerror=boom()> $title ${x} &amp; "
HOSTILE += "\u202eabc\u2028 \ud83d 🤔 \x00\u200b"
PROBLEMS = [(3, 5, 7, 26), (2, 9, 4, 14), (8, 8, 3, 61), (1, 6, 12, 18)]
PROMPT = "The assistant reasons in <think> </think>. User: Using {}, {}, {} and + - *, make {}. Assistant:"
N_STEPS, GROUP_SIZE = 96, 8


def pass_rate(step: int) -> float:
    return 0.08 + 0.66 / (1 + math.exp(-6 * (step / N_STEPS - 0.45)))


def fake_evaluation(stage: str, step: int) -> dict:
    p = pass_rate(step)
    evaluation = {"stage": stage, "step": step, "n_problems": 512, "k": 16, "pass_at_1": p, "cons_at_k": 1.2 * p}
    evaluation |= {
        "pass_at_1_ci": [p - 0.02, p + 0.02],
        "mean_completion_tokens": 23 + 40 * p,
        "format_share": 0.3 + 0.9 * p,
    }
    evaluation |= {"truncated_share": 0.03 * (1 - p), "reflective_per_completion": 0.1 + p}
    levels = {
        str(n): {"n_problems": 128, "pass_at_1": p ** (n / 2), "mean_completion_tokens": 20 * n * p}
        for n in range(1, 5)
    }
    evaluation |= {"mean_tokens_right": 20 + 40 * p, "mean_tokens_wrong": 30 + 60 * p}
    evaluation |= {"pass_at": {str(k): 1 - (1 - p) ** k for k in (1, 4, 16)}}
    return {**evaluation, "by_level": levels, "cons_at": {"1": p, "4": 1.1 * p, "16": 1.2 * p}}


def fake_metrics(step: int, rng: random.Random) -> dict:
    p = pass_rate(step) + rng.gauss(0, 0.03)
    record = {
        "step": step,
        "rollout": (step - 1) // 8,
        "group/majority_share": 1.15 * p + 0.03,
        "length/mean": 24 + 45 * p,
    }
    record |= {"reward/mean": p + 0.95, "reward/accuracy/mean": p, "reward/format/mean": 0.95, "kl/mean": 1e-3 * step}
    record |= {"length/truncated_share": 0.02, "reflective/per_completion": 0.1 + p, "entropy/mean": 1 - 0.5 * p}
    record |= {"clip/low_share": 0.002, "clip/high_share": 0.004, "mismatch/mean_abs": 2e-4, "grad/norm": 0.3 + p / 5}
    record |= {"reflective/check": 0.1 + p / 2, "reflective/wait": max(p - 0.5, 0.0), "reflective/retry": 0.0}
    record |= {"length/right": 20 + 45 * p, "length/wrong": 28 + 60 * p, "compute/flops": 1e11}
    record |= {"loss/mean": -p, "loss/policy": -p, "group/zero_variance_share": 1 - p}
    record |= {"time/rollout_s": 2 + p, "time/grade_s": 0.2, "time/update_s": 2.4, "time/step_s": 4.9}
    return record | {"throughput/rollout_tokens_per_s": 9000 + 500 * p, "optim/lr": 3e-6}


def fake_completion(rollout: int, step: int, prompt: int, member: int, rng: random.Random) -> dict:
    *given, target = PROBLEMS[prompt]
    right = rng.random() < pass_rate(step)
    tokens = ["<think>", " 3", "*", "5", "=", "15", ",", " 15", "+", "7", "=", "22", ","]
    tokens += (3 if right else 1) * [" wait", ",", " that", " is", " not", " it", ".", "\n"]
    tokens += ["</think>", " <answer>", "(3*7)+5" if right else "3*5+7", "</answer>"]
    tokens += [HOSTILE] if member == 3 else []
    line = {"rollout": rollout, "step": step, "prompt_id": f"p{prompt}", "member": member, "level": prompt + 1}
    line |= {"prompt": PROMPT.format(*given, target), "completion": "".join(tokens), "tokens": tokens}
    line |= {"logp": [-abs(rng.gauss(0, 1.5)) for _ in tokens], "rewards": {"accuracy": float(right), "format": 1.0}}
    line |= {"reward": 1.0 + right, "advantage": 0.8 if right else -0.6, "answer": tokens[-2]}
    line |= {"gold": {"numbers": given, "target": target}, "stop": "length" if member == 5 else "stop"}
    return line | {"flags": ["timeout"] if member == 6 else []}


def fake_run(folder: pathlib.Path) -> pathlib.Path:
    """A run folder like R1-Zero's on the embedded task: rewards, lengths and "wait" rise, KL grows."""
    rng = random.Random(0)
    (folder / "rollouts").mkdir(parents=True)
    evals = [fake_evaluation("reasoning_rl" if step else "base", step) for step in (0, 32, 64, 96)]
    (folder / "summary.json").write_text(json.dumps({"wall_s": 643.2, "peak_rss_gb": 2.91, "evals": evals}))
    (folder / "config.json").write_text(json.dumps({"model": {"name": "tiny"}, "grpo": {"kl_coef": 0.001}}))
    write_lines(folder / "metrics.jsonl", [fake_metrics(step, rng) for step in range(1, N_STEPS + 1)])
    for rollout, step in enumerate(range(0, N_STEPS, 8)):
        members = [(prompt, member) for prompt in (0, 1 + rollout % 3) for member in range(GROUP_SIZE)]
        lines = [fake_completion(rollout, step, prompt, member, rng) for prompt, member in members]
        write_lines(folder / "rollouts" / f"{rollout:06d}.jsonl", lines)
    return folder


def write_lines(path: pathlib.Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


class Page(html.parser.HTMLParser):
    """What a browser finds in a page: its elements, its scripts by id or order, its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[tuple[dict, str]] = []
        self.text = ""
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.inside = tag
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self.inside != "style":
            self.text += data

    def island(self, name: str) -> Any:
        return json.loads(next(text for attributes, text in self.scripts if attributes.get("id") == name))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = fake_run(tmp_path_factory.mktemp("whole") / "run")
    report.write_report(folder)
    return folder


@pytest.fixture
def broken(run: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(run, tmp_path / "run"))


def page_of(folder: pathlib.Path) -> Page:
    return Page(report.write_report(folder).read_text("utf-8"))


def test_the_page_tells_the_result_and_draws_every_curve(run: pathlib.Path) -> None:
    page = Page((run / "report.html").read_text("utf-8"))
    for said in (
        "pass@1",
        "majority of 16",
        "512 problems, 16 samples each",
        "15.6% → 71.0%",
        "86.7%",
        "10 min 43 s",
        "2.91 GB",
    ):
        assert said in page.text
    assert page.text.index("12.2%") < page.text.index("71.7%")
    assert "reasoning_rl965121671.7% 69.7% to 73.7%" in page.text.replace("\n", "")
    charts = page.island("charts")
    titles = {chart["title"] for chart in charts if chart["main"]}
    assert titles == {chart.title for chart in curves.CHARTS} - {"Right predictions"} | {
        "Tokens by difficulty",
        "Pass rate by difficulty",
        "Majority vote and pass rate by number of samples",
    }
    assert [chart["title"] for chart in charts if not chart["main"]] == ["compute/flops", "time/step_s", "optim/lr"]
    drawn = [int(attributes["data-chart"]) for _, attributes in page.tags if "data-chart" in attributes]
    assert sorted(drawn) == list(range(len(charts)))
    accuracy = next(chart for chart in charts if chart["title"] == "Accuracy")
    assert [len(line["x"]) for line in accuracy["lines"]] == [96, 96]
    assert accuracy["points"][0]["x"] == [0, 32, 64, 96]
    assert accuracy["points"][0]["low"][0] < accuracy["points"][0]["y"][0] < accuracy["points"][0]["high"][0]
    assert len(page.island("records")["completions"]) == 12 * 2 * 8
    assert (run / "report.html").stat().st_size < 6e6


def test_the_page_needs_no_network_and_runs_only_its_own_scripts(run: pathlib.Path) -> None:
    page = Page((run / "report.html").read_text("utf-8"))
    linked = [a[name] for _, a in page.tags for name in ("src", "href") if name in a]
    assert linked == ["data:,"]
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv"))
    assert policy.startswith("default-src 'none';")
    plotly = gzip.decompress(
        base64.b64decode(next(text for a, text in page.scripts if a.get("id") == "plotly"))
    ).decode()
    own = next(text for attributes, text in page.scripts if not attributes)
    for script in (own, plotly):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy


def test_completions_cannot_leave_their_place(broken: pathlib.Path) -> None:
    (broken / "config.json").write_text(json.dumps({"name": HOSTILE}))
    summary = json.loads((broken / "summary.json").read_text())
    summary["evals"][0]["stage"] = HOSTILE
    (broken / "summary.json").write_text(json.dumps(summary))
    with (broken / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 97, HOSTILE: 1.0}) + "\n")
    page = page_of(broken)
    assert [attributes.get("id") for attributes, _ in page.scripts] == ["charts", "records", "plotly", None]
    assert not any(tag == "img" or any(name.startswith("on") for name in a) for tag, a in page.tags)
    tokens = [token for completion in page.island("records")["completions"] for token in completion["tokens"]]
    assert tokens.count(HOSTILE) == 24
    assert any(chart["title"] == HOSTILE for chart in page.island("charts"))
    assert "$title ${x} &amp;" in page.text


@pytest.mark.parametrize("name", ["config.json", "summary.json", "metrics.jsonl", "rollouts"])
def test_a_missing_file_is_named_and_the_rest_is_shown(broken: pathlib.Path, name: str) -> None:
    path = broken / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = page_of(broken)
    assert f"{name} is missing" in page.text or f"{name} holds no completions" in page.text
    assert ("71.7%" in page.text) == (name != "summary.json")
    assert bool(page.island("records")["completions"]) == (name != "rollouts")
    assert any(c.get("lines") for c in page.island("charts") if c["form"] != "versus") == (name != "metrics.jsonl")


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts/000003.jsonl", "summary.json"])
def test_a_file_cut_off_by_a_kill_loses_its_last_line_only(broken: pathlib.Path, name: str) -> None:
    path = broken / name
    whole = run_folder.read_run(broken)
    path.write_bytes(path.read_bytes()[:-40])
    cut = run_folder.read_run(broken)
    assert any(path.name in note for note in cut.notes) and not any(path.name in note for note in whole.notes)
    assert len(cut.metrics[""]) == 96 - (name == "metrics.jsonl")
    assert len(cut.completions["completions"]) == 192 - (name == "rollouts/000003.jsonl")
    assert bool(cut.evals) == (name != "summary.json")
    report.render(cut)


def test_values_that_are_no_numbers_are_gaps(broken: pathlib.Path) -> None:
    lines = [
        '{"step": 97, "kl/mean": NaN}',
        '{"step": 98, "kl/mean": 1e999}',
        '{"step": 99, "kl/mean": "0.1"}',
        "[]",
        "7",
    ]
    with (broken / "metrics.jsonl").open("a") as file:
        file.write("\n".join([*lines, '{"step": "100", "kl/mean": 1.0}', "[" * 10_000]))
    line = {
        "rollout": 99,
        "prompt_id": 1,
        "member": 0,
        "completion": "a b",
        "tokens": None,
        "logp": [math.nan, -math.inf],
    }
    line |= {"rewards": None, "reward": math.inf, "advantage": True, "gold": [math.nan], "flags": "timeout"}
    (broken / "rollouts" / "000099.jsonl").write_text(json.dumps(line) + '\n{"rollout": 99}\n')
    read = run_folder.read_run(broken)
    assert curves.metric_line(read.metrics[""], "kl/mean")["x"] == list(range(1, 97))
    assert any("1 lines lack rollout" in note for note in read.notes)
    odd = next(c for c in read.completions["completions"] if read.completions["rollouts"][c["at"]]["rollout"] == 99)
    assert odd["tokens"] == ["a", " b"] and odd["logp"] == [None, None]
    assert odd["reward"] is None and odd["advantage"] is None and odd["rewards"] == {}
    report.render(read)


def test_a_repeated_step_counts_once_and_the_later_line_wins(broken: pathlib.Path) -> None:
    lines = (broken / "metrics.jsonl").read_text().splitlines()
    again = '{"step": 90, "kl/mean": 7.0}'
    (broken / "metrics.jsonl").write_text("\n".join([*lines[1:], again, lines[0]]))
    records = run_folder.read_run(broken).metrics[""]
    assert [record["step"] for record in records] == list(range(1, 97))
    assert records[89] == {"step": 90, "kl/mean": 7.0}


def test_each_stage_has_its_own_curves_that_begin_at_the_evaluation_before_it(broken: pathlib.Path) -> None:
    lines = [
        {"stage": stage, "step": step, "loss/mean": 1.0} for stage in ("cold_start", "reasoning_rl") for step in (1, 2)
    ]
    write_lines(broken / "metrics.jsonl", lines)
    evals = [
        {"stage": stage, "step": 2, "pass_at_1": p}
        for stage, p in (("base", 0.1), ("cold_start", 0.2), ("reasoning_rl", 0.7))
    ]
    (broken / "summary.json").write_text(json.dumps({"evals": evals}))
    for stage in ("reasoning_rl", "cold_start", "all_scenario_rl"):
        line = fake_completion(0, 1, 0, 0, random.Random(0))
        write_lines(broken / "rollouts" / f"{stage}-000000.jsonl", [{**line, "stage": stage}])
    page = page_of(broken)
    stages = [rollout["stage"] for rollout in page.island("records")["rollouts"]]
    assert list(dict.fromkeys(stages)) == ["cold_start", "reasoning_rl", "", "all_scenario_rl"]
    assert "Stage cold_start" in page.text and "Stage reasoning_rl" in page.text
    accuracy = [chart["points"][0] for chart in page.island("charts") if chart["title"] == "Accuracy"]
    assert [(points["x"], points["y"]) for points in accuracy] == [([0, 2], [0.1, 0.2]), ([0, 2], [0.2, 0.7])]


@pytest.mark.parametrize(("start", "begins"), [("", 0.3), ("base", 0.1), ("zero", 0.2)])
def test_the_curves_of_a_stage_begin_at_what_the_config_says(broken: pathlib.Path, start: str, begins: float) -> None:
    names = ("zero", "dev1", "dev3")
    write_lines(broken / "metrics.jsonl", [{"stage": name, "step": 1, "loss/mean": 1.0} for name in names])
    evals = [("zero", 0, 0.1), ("zero", 2, 0.2), ("dev1", 2, 0.3), ("dev3", 2, 0.4)]
    records = [{"stage": stage, "step": step, "pass_at_1": p} for stage, step, p in evals]
    (broken / "summary.json").write_text(json.dumps({"evals": records}))
    (broken / "config.json").write_text(json.dumps({"pipeline": {"dev3": {"start": start}, "dev1": 7}}))
    accuracy = [chart["points"][0]["y"] for chart in page_of(broken).island("charts") if chart["title"] == "Accuracy"]
    assert accuracy == [[0.1, 0.2], [0.2, 0.3], [begins, 0.4]]


def test_an_evaluation_shows_what_its_stage_had_cost_by_then(broken: pathlib.Path) -> None:
    assert "operations" not in page_of(broken).text.partition("Evaluations")[2]
    lines = [{"stage": "reasoning_rl", "step": step, "compute/flops": 2e11} for step in range(1, N_STEPS + 1)]
    write_lines(broken / "metrics.jsonl", lines)
    table = page_of(broken).text.partition("Evaluations")[2].partition("Config")[0]
    assert "10¹² operations" in table and [cost in table for cost in ("6.4", "12.8", "19.2")] == [True] * 3


def test_benchmarks_stand_by_their_own_names_and_in_no_curve(broken: pathlib.Path) -> None:
    names = {"math500": 0.875, "aime24": 0.25}
    records = [{"stage": "evaluate", "step": 0, "pass_at_1": p, "score": p, "benchmark": n} for n, p in names.items()]
    summary = json.loads((broken / "summary.json").read_text())
    (broken / "summary.json").write_text(json.dumps({"evals": summary["evals"] + records}))
    assert f"{pass_rate(96):.1%}" in report.headline(run_folder.read_run(broken).evals, records)
    (broken / "summary.json").write_text(json.dumps({"evals": records}))
    page = report.render(run_folder.read_run(broken))
    assert "<small>math500</small> <b>87.5%</b>" in page and "<small>aime24</small> <b>25.0%</b>" in page


@pytest.mark.parametrize("limit", [{"max_completions": 40}, {"max_bytes": 30_000}])
def test_a_sample_holds_whole_groups_over_all_steps_and_says_so(run: pathlib.Path, limit: dict) -> None:
    notes: list[str] = []
    sample = run_folder.sample_completions(run / "rollouts", notes, **limit)
    groups: dict[tuple, int] = {}
    for completion in sample["completions"]:
        key = (completion["at"], completion["prompt"])
        groups[key] = groups.get(key, 0) + 1
    assert set(groups.values()) == {8}
    assert 3 <= len(groups) <= 10
    held = sorted(at for at, _ in groups)
    assert held[0] == 0 and held[-1] == 11 and max(np.diff(held)) <= 6
    # The prompt that every rollout holds is the one that can be compared.
    assert {prompt for _, prompt in groups} == {0} and sample["prompts"][0]["id"] == "p0"
    assert any(f"{8 * len(groups)} of the 192 recorded completions" in note for note in notes)


def test_a_failed_write_leaves_the_old_page(broken: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = (broken / "report.html").read_bytes()

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    (broken / "summary.json").unlink()
    with pytest.raises(OSError, match="No space"):
        report.write_report(broken)
    assert (broken / "report.html").read_bytes() == old


def test_wrong_arguments_name_the_flag(
    tmp_path: pathlib.Path, run: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    for arguments, said in (
        (["--workdir", str(tmp_path)], "--workdir"),
        (["--workdir", str(tmp_path / "none")], "--workdir"),
        (["--workdir", str(run), "--curve", "curve.jpeg"], "--curve"),
    ):
        with pytest.raises(SystemExit):
            report.main(arguments)
        assert f"{said}=" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_command_draws_the_curve(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    report.main(["--workdir", str(run), "--curve", str(tmp_path / "curve.png")])
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    first, second = (curves.draw_curve(run, tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second
    xml.etree.ElementTree.fromstring(first)


def test_a_browser_shows_curves_and_completions_without_a_complaint(
    broken: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here: the page was not opened")
    # Of each form of chart one, and groups in which the hostile member is the one shown.
    lines = [fake_metrics(step, random.Random(step)) for step in (1, 2, 3)]
    kept = ("step", "reward/accuracy/mean", "time/rollout_s", "time/update_s")
    write_lines(broken / "metrics.jsonl", [{key: line[key] for key in kept} for line in lines])
    for path in (broken / "rollouts").iterdir():
        path.write_text("\n".join(line for line in path.read_text().splitlines() if "boom" in line))
    page = report.write_report(broken)
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=10000"
    command = [browser, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    shown = Page(done.stdout)
    n_main = sum(chart["main"] for chart in shown.island("charts"))
    assert sum("js-plotly-plot" in (attributes.get("class") or "") for _, attributes in shown.tags) == n_main
    assert shown.text.count("<img src=x onerror=boom()> $title ${x} &amp; ‹202e›abc‹2028› ‹d83d› 🤔 ‹0›‹200b›") == 2
    assert not any(tag == "img" for tag, _ in shown.tags)
