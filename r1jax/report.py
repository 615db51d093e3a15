"""The page of a run: `python -m r1jax.report --workdir=DIR` writes DIR/report.html, one file that needs no network.

Result, curves and a browser of completions, after the figures with which DeepSeek-R1's report tells its story
(arXiv 2501.12948, section 2.2). Whatever the run wrote is data on this page, never markup: completions hold anything.
"""

import argparse
import base64
import functools
import gzip
import hashlib
import html
import importlib.resources
import json
import pathlib
import string
from typing import Any

from plotly.offline import get_plotlyjs

from r1jax import hosts
from r1jax.analyses import evaluation_charts
from r1jax.curves import alarm_charts, draw_curve, readable, run_charts
from r1jax.run_folder import Record, RunFolder, number, read_run

REPORTED = (
    "Reported for DeepSeek-R1-Zero on AIME 2024 (another task, a policy of 671B parameters): "
    "pass@1 15.6% → 71.0%, majority vote 86.7%."
)
# field of an evaluation -> heading, unit
EVAL_COLUMNS = {
    "benchmark": ("benchmark", ""),
    "score": ("score", "share"),
    "metric": ("by", ""),
    "stage": ("stage", ""),
    "step": ("step", ""),
    "n_problems": ("problems", ""),
    "k": ("k", ""),
    "pass_at_1": ("pass@1", "share"),
    "cons_at_k": ("majority of k", "share"),
    "mean_completion_tokens": ("tokens a completion", ""),
    "reflective_per_completion": ("reflective words a completion", ""),
    "format_share": ("in format", "share"),
    "language_consistency": ("language consistency", "share"),
    "general_worth": ("worth of letters", "share"),
    "general_win_rate": ("wins on letters", "share"),
    "truncated_share": ("cut off", "share"),
    "training_tflops": ("training of the stage, 10¹² operations", ""),
}
# The same of a reward model; of rows, a pair has two.
REWARD_MODEL_COLUMNS = {
    "stage": ("stage", ""),
    "model": ("reward model", ""),
    "held_out": ("held-out rows", ""),
    "eval/accuracy": ("right", "share"),
    "eval/length_correlation": ("correlation of score and length", ""),
    "unsafe_share": ("unsafe", "share"),
}
TILES = ("mean_completion_tokens", "reflective_per_completion", "format_share", "truncated_share")


def write_report(workdir: str | pathlib.Path) -> pathlib.Path:
    """Writes `workdir`/report.html, whole or not at all, and returns its path; ValueError if it is no run folder."""
    path = pathlib.Path(workdir) / "report.html"
    # A lone surrogate outside the JSON has no bytes; inside it is an ASCII escape.
    hosts.atomic_write(path, render(read_run(workdir)).encode("utf-8", "replace"))
    return path


def render(run: RunFolder) -> str:
    """The page's HTML."""
    assets = importlib.resources.files("r1jax") / "report_page"
    script = "\n".join((assets / name).read_text("utf-8") for name in ("page.js", "completions.js", "curves.js"))
    library_hash, library = _plotly()
    charts: list[Record] = []
    return string.Template((assets / "page.html").read_text("utf-8")).substitute(
        policy=f"script-src 'sha256-{_sha256(script)}' 'sha256-{library_hash}'",
        title=html.escape(run.name),
        headline=headline(run.evals, run.benchmarks),
        tiles=_tiles(run),
        notes="".join(f"<li>{html.escape(note)}</li>" for note in run.notes),
        curves=_curves(run, charts),
        evals=_table([_with_cost(run, one) for one in run.evals + run.benchmarks], EVAL_COLUMNS)
        + ("<h3>Reward models</h3>" + _table(run.reward_models, REWARD_MODEL_COLUMNS) if run.reward_models else ""),
        config=html.escape(json.dumps(run.config, indent=2, sort_keys=True)) if run.config else "",
        style=(assets / "page.css").read_text("utf-8"),
        charts=island(charts),
        completions=island(run.completions),
        plotly=library,
        script=script,
    )


def island(value: Any) -> str:
    """`value` as JSON that can stand in a <script> element: pure ASCII, and nothing in it looks like markup."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


@functools.cache
def _plotly() -> tuple[str, str]:
    """Plotly's JavaScript: its hash, and its text compressed (1.9 MB instead of 4.8)."""
    code = get_plotlyjs()
    return _sha256(code), base64.b64encode(gzip.compress(code.encode(), mtime=0)).decode()


def _sha256(code: str) -> str:
    return base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()


def _interval(evaluation: Record, field: str) -> str:
    """The field's confidence interval in words, empty without one."""
    bounds = evaluation.get(f"{field}_ci")
    bounds = [number(bound) for bound in bounds] if isinstance(bounds, list) else [None]
    return "" if None in bounds else " to ".join(readable(bound, "share") for bound in bounds)


def _first_and_last(evals: list[Record], field: str) -> list[float]:
    """The first and the last value of the field: two numbers, one, or none."""
    values = [value for e in evals if (value := number(e.get(field))) is not None]
    return values if len(values) < 2 else [values[0], values[-1]]


def _arrow(values: list[float], unit: str = "") -> str:
    return " → ".join(f"<b>{readable(value, unit)}</b>" for value in values)


def headline(evals: list[Record], benchmarks: list[Record]) -> str:
    """The run's result in one line, what it was measured on, and what the report says of R1-Zero, as HTML."""
    passed, agreed = (_first_and_last(evals, field) for field in ("pass_at_1", "cons_at_k"))
    if not passed and benchmarks:
        scores = ((html.escape(str(one["benchmark"])), _first_and_last([one], "score")) for one in benchmarks)
        line = " ".join(f"<span><small>{name}</small> {_arrow(score, 'share')}</span>" for name, score in scores)
        return f"<h1>{line}</h1>"
    if not passed:
        return f'<h1>No evaluation yet</h1><p class="reported">{REPORTED}</p>'
    last = next(e for e in reversed(evals) if number(e.get("pass_at_1")) is not None)
    k = number(last.get("k"))
    majority = f"majority of {k}" if k else "majority vote"
    line = f"<span><small>pass@1</small> {_arrow(passed, 'share')}</span>"
    if agreed:
        line += f" <span><small>{majority}</small> {_arrow(agreed, 'share')}</span>"
    basis = []
    if (n_problems := number(last.get("n_problems"))) is not None:
        basis.append(f"{n_problems:,} problems" + (f", {k} samples each" if k else ""))
    if interval := _interval(last, "pass_at_1"):
        basis.append(f"confidence interval of the last pass@1: {interval}")
    return f'<h1>{line}</h1><p>{"; ".join(basis)}</p><p class="reported">{REPORTED}</p>'


def _tiles(run: RunFolder) -> str:
    tiles = [(EVAL_COLUMNS[f][0], _arrow(_first_and_last(run.evals, f), EVAL_COLUMNS[f][1])) for f in TILES]
    if (wall_s := number(run.summary.get("wall_s"))) is not None:
        minutes, seconds = divmod(round(wall_s), 60)
        hours, minutes = divmod(minutes, 60)
        tiles.append(("wall time", f"<b>{hours} h {minutes} min</b>" if hours else f"<b>{minutes} min {seconds} s</b>"))
    if (peak_gb := number(run.summary.get("peak_rss_gb"))) is not None:
        tiles.append(("peak memory", f"<b>{peak_gb:.2f} GB</b>"))
    return "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in tiles if value)


def _curves(run: RunFolder, charts: list[Record]) -> str:
    """The figures as HTML; what they draw is appended to `charts`, where their data-chart attribute finds it."""
    parts = []
    for stage, records in (run.metrics or {"": []}).items():
        own = [e for e in run.evals if e.get("stage") == stage]
        drawn = run_charts(records, _start(run, stage) + own if len(run.metrics) > 1 else run.evals)
        drawn += alarm_charts([e for e in run.validation if e.get("stage") == stage])
        if len(run.metrics) > 1:
            parts.append(f"<h3>Stage {html.escape(stage)}</h3>")
        else:
            drawn[3:3] = evaluation_charts(run.evals)
        main, other = ([chart for chart in drawn if chart["main"] is kind] for kind in (True, False))
        parts.append(_figures(main, charts))
        if other:
            parts.append(f"<details><summary>{len(other)} more metrics</summary>{_figures(other, charts)}</details>")
    if len(run.metrics) > 1:
        parts.append(_figures(evaluation_charts(run.evals), charts))
    return "".join(parts)


def _start(run: RunFolder, stage: str) -> list[Record]:
    """The evaluation that a stage begins at, as its step 0: that of the stage it starts from, or of the one before."""
    first = next((i for i, e in enumerate(run.evals) if e.get("stage") == stage), 0)
    group = run.config.get("pipeline")
    settings = group.get(stage) if isinstance(group, dict) else None
    name = settings.get("start") if isinstance(settings, dict) else None
    before = run.evals[:first]
    if name == "base":
        before = [e for e in before[:1] if e.get("step") == 0]
    elif name:
        before = [e for e in before if e.get("stage") == name]
    return [{**e, "step": 0} for e in before[-1:] if first and run.evals[first].get("step") != 0]


def _figures(drawn: list[Record], charts: list[Record]) -> str:
    figures = []
    for chart in drawn:
        unit = "" if chart["unit"] == "share" else chart["unit"]  # the axis says %
        title, unit, says = (html.escape(text) for text in (chart["title"], unit, chart["says"]))
        figures.append(
            f'<figure><figcaption><strong>{title}</strong> <span class="unit">{unit}</span>'
            f'<br>{says}</figcaption><div class="plot" data-chart="{len(charts)}"></div></figure>'
        )
        charts.append(chart)
    return f'<div class="figures">{"".join(figures)}</div>' if figures else ""


def _with_cost(run: RunFolder, evaluation: Record) -> Record:
    """The evaluation with what its stage had cost by then, where the metrics say it."""
    flops = run.training_flops(str(evaluation.get("stage")), number(evaluation.get("step")) or 0)
    return {**evaluation, "training_tflops": flops / 1e12} if flops else evaluation


def _table(evals: list[Record], columns: dict[str, tuple[str, str]]) -> str:
    if not evals:
        return ""
    rows = []
    shown = {field: column for field, column in columns.items() if any(field in one for one in evals)}
    for evaluation in evals:
        cells = []
        for field, (_, unit) in shown.items():
            value = evaluation.get(field)
            text = readable(value, unit) if number(value) is not None else "" if value is None else str(value)
            interval = _interval(evaluation, field)
            cells.append(f"<td>{html.escape(text)}{f' <small>{interval}</small>' if interval else ''}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th scope=col>{heading}</th>" for heading, _ in shown.values())
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m r1jax.report", description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, help="a run's folder")
    parser.add_argument("--curve", help="draw only the accuracy and length curves, to this .png or .svg")
    options = parser.parse_args(arguments)
    try:
        print(draw_curve(options.workdir, options.curve) if options.curve else write_report(options.workdir))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
