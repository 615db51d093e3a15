"""What an evaluation shows beyond one number, as charts: by difficulty, and by how many samples are asked for.

After the DeepSeek-R1 report's own analyses (arXiv 2501.12948): harder problems get more tokens, and the majority vote
gains on the single answer. The first evaluation of a run stands beside the last one.
"""

from r1jax.curves import arrow
from r1jax.run_folder import Record, number


def evaluation_charts(evals: list[Record]) -> list[Record]:
    """All charts that these evaluations have numbers for, ready for JSON."""
    return level_charts(evals) + sample_charts(evals)


def level_charts(evals: list[Record]) -> list[Record]:
    """Difficulty against tokens and pass@1: {title, unit, form, says, main, bars: [{label, x, y}]}."""
    charts = []
    for title, unit, field in (
        ("Tokens by difficulty", "tokens", "mean_completion_tokens"),
        ("Pass rate by difficulty", "share", "pass_at_1"),
    ):
        bars = []
        for label, evaluation in _compared(evals, "by_level"):
            levels = {level: v.get(field) for level, v in evaluation["by_level"].items() if isinstance(v, dict)}
            if line := _line(label, levels):
                bars.append(line)
        if bars:
            ends = dict.fromkeys([bars[-1]["x"][0], bars[-1]["x"][-1]])  # the easiest and the hardest
            values = {level: [dict(zip(b["x"], b["y"], strict=True)).get(level) for b in bars] for level in ends}
            says = "; ".join(f"level {level} {arrow(y, unit)}" for level, y in values.items())
            charts.append({"title": title, "unit": unit, "form": "bars", "says": says, "main": True, "bars": bars})
    return charts


def sample_charts(evals: list[Record]) -> list[Record]:
    """Majority vote and pass@k against k: {title, unit, form, axis, says, main, lines: [{label, x, y}]}."""
    lines, says = [], []
    for field, name in (("cons_at", "majority of k"), ("pass_at", "pass@k")):
        found = [_line(f"{name}, {label}", e[field]) for label, e in _compared(evals, field)]
        found = [line for line in found if line]
        lines += found
        if found:
            k = found[-1]["x"][-1]
            says.append(f"{name.removesuffix('k')}{k} {arrow([line['y'][-1] for line in found], 'share')}")
    if not lines:
        return []
    title = "Majority vote and pass rate by number of samples"
    same = {"unit": "share", "form": "versus", "axis": "samples, k", "main": True}
    return [{"title": title, **same, "says": "; ".join(says), "lines": lines, "points": []}]


def _compared(evals: list[Record], field: str) -> list[tuple[str, Record]]:
    """The first and the last evaluation that hold a table of this name, each with its label."""
    there = [e for e in evals if isinstance(e.get(field), dict) and e[field]]
    return [("before", there[0]), ("after", there[-1])] if len(there) > 1 else [("measured", e) for e in there]


def _line(label: str, values: Record) -> Record | None:
    pairs = [(key, number(value)) for key, value in sorted(values.items(), key=lambda item: _natural(item[0]))]
    pairs = [(key, value) for key, value in pairs if value is not None]
    return {"label": label, "x": [key for key, _ in pairs], "y": [value for _, value in pairs]} if pairs else None


def _natural(key: str) -> tuple[float, str]:
    try:
        return float(key), key
    except ValueError:
        return float("inf"), key
