"""The curves of a run: which metrics share a chart, smoothed and thinned, and the README's picture of them.

The selection follows the DeepSeek-R1 report's own evidence (arXiv 2501.12948: accuracy with majority vote and response
length over training, figures 2 and 3; reflective words and difficulty against tokens in the appendix), then what one
looks at when a run goes wrong.
"""

import pathlib
import re
import statistics
from typing import Any, NamedTuple

import numpy as np

from r1jax.run_folder import Record, number, read_run

MAX_POINTS = 600  # per line: more than a screen is wide for
SMOOTHING = 1 / 20  # of a run's steps make the window of the moving mean

# Okabe and Ito's colour-blind-safe hues (jfly.uni-koeln.de/color); the page lightens them on a dark ground.
BLUE, VERMILLION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"


class Chart(NamedTuple):
    """`metrics` maps patterns of metrics.jsonl keys to labels, `evals` an evaluation's fields to theirs."""

    title: str
    unit: str
    metrics: dict[str, str]
    evals: dict[str, str] = {}  # noqa: RUF012 (a named tuple's default is never written to)
    form: str = "lines"


CHARTS = (
    Chart(
        "Accuracy",
        "share",
        {r"reward/accuracy/mean": "training", r"group/majority_share": "training, majority of the group"},
        {"pass_at_1": "evaluation, pass@1", "cons_at_k": "evaluation, majority of k"},
    ),
    Chart("Completion length", "tokens", {r"length/mean": "training"}, {"mean_completion_tokens": "evaluation"}),
    Chart(
        "Reflective words",
        "per completion",
        {r"reflective/per_completion": "training"},
        {"reflective_per_completion": "evaluation"},
    ),
    Chart("Reflective words, one by one", "per completion", {r"reflective/(?!per_)(\w+)": r"\1"}, form="rise"),
    Chart(
        "Length by correctness",
        "tokens",
        {r"length/right": "training, right", r"length/wrong": "training, wrong"},
        {"mean_tokens_right": "evaluation, right", "mean_tokens_wrong": "evaluation, wrong"},
    ),
    Chart("Loss", "nats", {r"loss/mean": "minimised", r"loss/(.+)": r"\1"}),
    Chart("Right predictions", "share", {r"accuracy/(.+)": r"\1"}),
    Chart("Rewards", "mean reward", {r"reward/mean": "weighted sum", r"reward/(.+)/mean": r"\1"}),
    Chart("KL to the reference", "nats a token", {r"kl/mean": "KL"}),
    Chart("Entropy", "nats a token", {r"entropy/mean": "entropy"}),
    Chart("Gradient norm", "before clipping", {r"grad/norm": "norm"}),
    Chart("Clipped tokens", "share", {r"clip/low_share": "ratio too low", r"clip/high_share": "ratio too high"}),
    Chart("Sampler against trainer", "nats a token", {r"mismatch/mean_abs": "mean |difference| of log-probabilities"}),
    Chart("Groups of equal rewards", "share", {r"group/zero_variance_share": "groups"}),
    Chart("Cut-off completions", "share", {r"length/truncated_share": "training"}, {"truncated_share": "evaluation"}),
    Chart("Time of each move", "seconds a step", {r"time/(?!step_s|total_s)(.+)_s": r"\1"}, form="stack"),
    Chart("Generation speed", "tokens a second", {r"throughput/rollout_tokens_per_s": "sampler"}),
)
# What the alarm for reward hacking looks at (section 2.3.4): the one should not rise while the other falls.
WATCHED = Chart(
    "Watched for reward hacking",
    "share",
    {},
    {"preference": "validation, reward models' score", "pass_at_1": "validation, pass@1"},
)
_NO_CURVES = {"step", "rollout"}  # they are the axis


def evaluation_points(evals: list[Record], field: str) -> Record:
    """The field's values over steps, {x, y, low, high}; low and high are None without a confidence interval."""
    points: Record = {"x": [], "y": [], "low": [], "high": []}
    for evaluation in evals:
        step, value = number(evaluation.get("step")), number(evaluation.get(field))
        if step is None or value is None:
            continue
        interval = evaluation.get(f"{field}_ci")
        low, high = interval if isinstance(interval, list) and len(interval) == 2 else (None, None)
        for key, entry in zip(("x", "y", "low", "high"), (step, value, number(low), number(high)), strict=True):
            points[key].append(entry)
    return points


def metric_line(records: list[Record], key: str) -> Record:
    """The metric's {x, y, smooth} over steps without gaps, at most MAX_POINTS of them: more are averaged in bins."""
    pairs = [(r["step"], value) for r in records if (value := number(r.get(key))) is not None]
    n_bins = min(len(pairs), MAX_POINTS)
    bins = np.array_split(np.asarray(pairs, np.float64), n_bins) if pairs else []
    x, y = np.array([b.mean(axis=0) for b in bins]).reshape(-1, 2).T
    return {"x": _rounded(x), "y": _rounded(y), "smooth": _rounded(moving_mean(y))}


def moving_mean(y: np.ndarray) -> np.ndarray:
    """The centred moving mean of y [T] over SMOOTHING * T values; at the ends, over those that exist."""
    reach = round(len(y) * SMOOTHING) // 2
    window = np.ones(2 * reach + 1)
    if not len(y):
        return y
    return np.convolve(y, window)[reach : len(y) + reach] / np.convolve(np.ones_like(y), window)[reach : len(y) + reach]


def half_way(line: Record) -> float:
    """The first step at which the smoothed line is at half of its highest value or above it."""
    return next(x for x, y in zip(line["x"], line["smooth"], strict=True) if y >= max(line["smooth"]) / 2)


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def run_charts(records: list[Record], evals: list[Record]) -> list[Record]:
    """One stage's charts as {title, unit, form, says, main, lines, points}, ready for JSON; empty ones are left out.

    Metrics in no chart of CHARTS get one each, with `main` false.
    """
    keys = [key for key in dict.fromkeys(key for record in records for key in record) if key not in _NO_CURVES]
    used: set[str] = set()
    charts = []
    for chart in CHARTS:
        found = {}
        for pattern, label in chart.metrics.items():
            for key in keys:
                if key not in found and (match := re.fullmatch(pattern, key)):
                    found[key] = match.expand(label)
        used |= found.keys()
        charts.append(_filled(chart, {label: key for key, label in found.items()}, records, evals, main=True))
    for key in keys:
        if key not in used:
            charts.append(_filled(Chart(key, "", {}), {key: key}, records, evals, main=False))
    return [chart for chart in charts if chart["lines"] or chart["points"]]


def alarm_charts(validation: list[Record]) -> list[Record]:
    """The chart of what the alarm for reward hacking has looked at, if it has."""
    return [chart for chart in [_filled(WATCHED, {}, [], validation, main=True)] if chart["points"]]


def _filled(chart: Chart, keys: dict[str, str], records: list[Record], evals: list[Record], main: bool) -> Record:
    lines = [{"label": label, **metric_line(records, key)} for label, key in keys.items()]
    points = [{"label": label, **evaluation_points(evals, field)} for field, label in chart.evals.items()]
    lines, points = [line for line in lines if line["x"]], [line for line in points if line["x"]]
    if chart.form == "rise":  # what never occurs is left out; what rises last is what one looks for
        lines = [line for line in lines if any(line["y"])]
        says = "; ".join(
            f"{line['label']} {arrow([line['smooth'][0], line['smooth'][-1]], chart.unit)}, "
            f"half of its most at step {half_way(line):g}"
            for line in lines
        )
    elif chart.form == "stack":
        says = "median " + ", ".join(f"{line['label']} {statistics.median(line['y']):.2g} s" for line in lines)
    else:
        ends = [(p["label"], p["y"]) for p in points] or [(line["label"], line["smooth"]) for line in lines]
        says = "; ".join(f"{label} {arrow([y[0], y[-1]], chart.unit)}" for label, y in ends)
    return {**chart._asdict(), "main": main, "says": says, "lines": lines, "points": points}


def arrow(values: list[float | None], unit: str) -> str:
    """Values in words, the missing ones left out: before → after."""
    return " → ".join(readable(value, unit) for value in values if value is not None)


def readable(value: float, unit: str = "") -> str:
    """Three significant digits; shares as a percentage."""
    if unit == "share":
        return f"{100 * value:.1f}%"
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}"


def draw_curve(workdir: str | pathlib.Path, path: str | pathlib.Path) -> pathlib.Path:
    """Draws accuracy and completion length over the last stage's steps to `path`, a .png or .svg; returns the path."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path = pathlib.Path(path)
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"--curve={path}: wanted a name that ends in .png or .svg")
    run = read_run(workdir, with_completions=False)
    records = list(run.metrics.values())[-1] if run.metrics else []
    charts = {chart["title"]: chart for chart in run_charts(records, run.evals)}
    shown = [charts[title] for title in ("Accuracy", "Completion length") if title in charts]
    if not shown:
        raise ValueError(
            f"--workdir={workdir}: neither metrics.jsonl nor summary.json holds accuracy or length to draw"
        )

    style: dict[str, Any] = {
        "font.size": 10,
        "svg.hashsalt": "r1jax",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(4.8 * len(shown), 3.4), layout="constrained")
        for axes, chart in zip(np.atleast_1d(figure.subplots(1, len(shown))), shown, strict=True):
            _draw(axes, chart)
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def _draw(axes: Any, chart: Record) -> None:
    for line, colour in zip(chart["lines"], (BLUE, VERMILLION), strict=False):
        axes.plot(line["x"], line["y"], color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(line["x"], line["smooth"], color=colour, linewidth=2, label=line["label"])
    for line, colour, marker in zip(chart["points"], (GREEN, PURPLE), "oD", strict=False):
        y, low, high = (np.array(line[key], np.float64) for key in ("y", "low", "high"))
        reach = np.nan_to_num(np.stack([y - low, high - y])).clip(min=0)
        axes.errorbar(line["x"], y, reach, color=colour, marker=marker, linestyle=":", capsize=3, label=line["label"])
    axes.set_title(chart["title"], loc="left", fontweight="bold")
    axes.set_xlabel("step")
    axes.set_ylabel(chart["unit"])
    axes.set_ylim(bottom=0)
    if chart["unit"] == "share":
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter("{x:.0%}")
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, fontsize=8.5)
