"""Plans as text, as JSON rows and as one small HTML page."""

import html
import json
import math
from collections.abc import Sequence
from typing import Any

from r1jax.plan import schedule
from r1jax.plan.account import Plan, Row, remedy
from r1jax.plan.topology import Topology

KINDS = (*("parameters", "frozen", "optimizer", "reference", "gradients", "weights", "cache", "batch", "activations"),)


def _time(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    for limit, unit, scale in ((1e-3, "us", 1e6), (1.0, "ms", 1e3), (600.0, "s", 1.0), (math.inf, "min", 1 / 60)):
        if seconds < limit:
            return f"{seconds * scale:.3g} {unit}"
    return ""


def _columns(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))  # noqa: B905
        for line in lines
    )


def _bottleneck(row: Row) -> str:
    if row.cost is None:
        return "not priced"
    exposed = max(row.cost.seconds - row.cost.compute_s - row.cost.kernel_s, 0.0)
    return f"{exposed / row.cost.seconds:.0%} waits" if row.cost.seconds else "-"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}" if size else "-"


def _layout(plan: Plan, topology: Topology) -> str:
    if not plan.rows:
        return f"== {plan.layout} ==\n" + (f"this layout cannot be: {plan.failed}" if plan.failed else plan.skipped)
    lines = [("program", "HBM GB", "fits", "estimate", "waits", "MFU", "calls", "compile")]
    for row in plan.rows:
        mfu = f"{row.mfu:.1%}" if row.flops and row.cost else "-"
        compile_s = f"{row.compile_s:.0f} s"
        cells = (_gb(row.hbm_total), "yes" if row.fits else "NO", _time(row.est_s), _bottleneck(row), mfu)
        lines.append((row.program, *cells, f"{row.calls:.0f}", compile_s))
    kinds = [kind for kind in KINDS if any(row.hbm.get(kind) for row in plan.rows)]
    memory = [("GB a device", *kinds)]
    memory += [(row.program, *(_gb(row.hbm.get(kind, 0.0)) for kind in kinds)) for row in plan.rows]
    away = [kind for kind in KINDS if any(row.host.get(kind) for row in plan.rows)]
    held = [("GB a device in host memory", *away, "moved in a call, estimated")]
    held += [
        (row.program, *(_gb(row.host.get(kind, 0.0)) for kind in away), _time(row.cost.host_s) if row.cost else "-")
        for row in plan.rows
        if row.host
    ]
    moved = [("GB a device and call", "collective", "mesh axes", "bytes", "time")]
    for row in plan.rows:
        found = sorted(row.cost.moved.items(), key=lambda item: -row.cost.wire[item[0]]) if row.cost else []
        for (kind, axes), size in found[:6]:
            if size > 1e6:
                moved.append((row.program, kind, axes or "-", f"{size / 1e9:.3g} GB", _time(row.cost.wire[kind, axes])))
    named = f"== {plan.layout} ==" + (f" with {plan.settings}" if plan.settings else "")
    parts = [named, _columns(lines), "", _columns(memory)]
    if len(held) > 1:
        parts += ["", _columns(held)]
    if len(moved) > 1:
        parts += ["", _columns(moved)]
    for row in plan.rows:
        if row.program in ("generate_short", "generate") and row.cost:
            # What a token cannot take less than: every weight and all caches are read once.
            least = (row.hbm.get("weights", 0.0) + row.hbm.get("cache", 0.0)) / topology.chip.hbm_bandwidth
            parts.append(
                f"{row.program}: {_time(row.est_s / row.trips)} a token; reading weights and caches takes "
                f"{_time(least)}, {least * row.trips / row.est_s:.0%} of it"
            )
    unpriced = {row.program: row.cost.unpriced for row in plan.rows if row.cost and row.cost.unpriced}
    loops = {row.program: row.cost.open_loops for row in plan.rows if row.cost and row.cost.open_loops}
    for name, n in unpriced.items():
        parts.append(f"{name}: {n} kernels without an estimate are left out of its time")
    for name, n in loops.items():
        parts.append(f"{name}: {n} inner loops of unknown length are counted once")
    parts += [remedy(row, topology.chip.hbm) for row in plan.rows if not row.fits]
    parts += [f"{row.program}: {row.failed}" for row in plan.rows if row.fits and row.failed]
    parts += [plan.skipped] if plan.skipped else []
    if not math.isnan(plan.run_hours):
        day = plan.tokens_per_s * 86400
        parts.append(
            f"the loop, estimated: rollout {_time(plan.rollout_s)}, scoring and updates {_time(plan.updates_s)}; "
            f"{plan.tokens_per_s:,.0f} completion tokens a second, {day:.3g} a day; "
            f"{schedule.covered(plan)}: {plan.run_hours:,.0f} hours on {topology.chips} chips, "
            f"{plan.run_hours * topology.chips:,.0f} chip-hours"
        )
    return "\n".join(parts)


def _comparison(plans: Sequence[Plan]) -> str:
    lines = [("layout", "fits", "largest HBM GB", "rollout", "score+update", "update MFU", "s an update", "tokens/s")]
    for plan in plans:
        update = next((row for row in plan.rows if row.program == "update"), None)
        lines.append(
            (
                plan.layout,
                ("yes" if plan.rows else "-") if plan.fits else "NO",
                _gb(max((row.hbm_total for row in plan.rows), default=0.0)),
                _time(plan.rollout_s),
                _time(plan.updates_s),
                f"{update.mfu:.1%}" if update and update.cost else "-",
                "-" if math.isnan(plan.update_s) else f"{plan.update_s:,.1f}",
                "-" if math.isnan(plan.tokens_per_s) else f"{plan.tokens_per_s:,.0f}",
            )
        )
    return _columns(lines)


def rank(plans: Sequence[Plan]) -> list[Plan]:
    """Those that fit first, the whole loops before parts, by the time for an update; what has no price comes last."""

    def key(p: Plan) -> tuple:
        return not p.fits, bool(p.failed), bool(p.skipped), math.isnan(p.update_s), p.update_s

    return sorted(plans, key=key)


def text(title: str, plans: Sequence[Plan], topology: Topology, notes: Sequence[str]) -> str:
    """All layouts, and a comparison where there are several."""
    parts = [title, *notes, ""]
    for plan in plans:
        parts += [_layout(plan, topology), ""]
    if len(plans) > 1:
        parts += ["== comparison, best first ==", _comparison(rank(plans))]
    for name, hours in schedule.together(plans).items():
        parts.append(
            f"{name}: the report's whole schedule, {sum(schedule.parts().values()):,} updates, {hours:,.0f} hours, "
            f"{hours * topology.chips:,.0f} chip-hours"
        )
    return "\n".join(parts).rstrip()


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _loop(plan: Plan, topology: Topology, title: str, notes: Sequence[str], hours: float | None) -> dict[str, Any]:
    """A layout's row of the whole loop: what was assumed, and what comes of it."""
    moved: dict[str, float] = {}
    for row in plan.rows:
        for (kind, axes), size in (row.cost.moved if row.cost else {}).items():
            moved[f"{kind} {axes}"] = moved.get(f"{kind} {axes}", 0.0) + row.calls * size / 1e9
    return {
        "layout": plan.layout,
        "program": "loop",
        "hbm_gb": max((row.hbm_total / 1e9 for row in plan.rows), default=None),
        "fits": None if plan.fits and not plan.rows else plan.fits,
        "est_s": _known(plan.rollout_s + plan.updates_s),
        "mfu": None,
        "collective_gb": sum(moved.values()) if plan.rows else None,
        "compile_s": sum(row.compile_s for row in plan.rows),
        "collective_gb_by_kind": moved,
        "rollout_s": _known(plan.rollout_s),
        "score_and_updates_s": _known(plan.updates_s),
        "update_s": _known(plan.update_s),
        "updates": plan.updates,
        "tokens_per_s": _known(plan.tokens_per_s),
        "tokens_per_day": _known(plan.tokens_per_s * 86400),
        "run_updates": plan.run_updates,
        "run_hours": _known(plan.run_hours),
        "chip_hours": _known(plan.run_hours * topology.chips),
        "reported_schedule_chip_hours": None if hours is None else hours * topology.chips,
        "failed": plan.failed,
        "skipped": plan.skipped,
        "settings": plan.settings,
        "about": {
            "title": title,
            "topology": topology.name,
            "chips": topology.chips,
            "devices": len(topology.devices),
            "hbm_gb": topology.chip.hbm / 1e9,
            "max_completion_tokens": plan.longest,
            "completion_tokens": plan.load.completion_tokens if plan.load else None,
            "prompt_tokens": plan.load.prompt_tokens if plan.load else None,
            "notes": list(notes),
        },
    }


def rows(title: str, plans: Sequence[Plan], topology: Topology, notes: Sequence[str]) -> list[dict[str, Any]]:
    """Rows for JSON: layout, program, hbm_gb, fits, est_s, mfu, collective_gb, compile_s, and details behind them.

    After a layout's programs comes one of the loop, whose est_s is of a rollout and its updates, as far as planned.
    """
    out, whole = [], schedule.together(plans)
    for plan in plans:
        for row in plan.rows:
            cost = row.cost
            out.append(
                {
                    "layout": row.layout,
                    "program": row.program,
                    "hbm_gb": row.hbm_total / 1e9,
                    "fits": row.fits,
                    "est_s": row.est_s if cost else None,
                    "mfu": row.mfu if cost else None,
                    "collective_gb": sum(cost.moved.values()) / 1e9 if cost else None,
                    "compile_s": row.compile_s,
                    "calls": row.calls,
                    "flops": row.flops,
                    "hbm_gb_by_kind": {kind: size / 1e9 for kind, size in row.hbm.items()},
                    "host_gb_by_kind": {kind: size / 1e9 for kind, size in row.host.items()},
                    "collective_gb_by_kind": {f"{k} {a}": v / 1e9 for (k, a), v in cost.moved.items()} if cost else {},
                    "compute_s": cost.compute_s if cost else None,
                    "wire_s": cost.wire_s if cost else None,
                    "wire_s_by_kind": {f"{k} {a}": v for (k, a), v in cost.wire.items()} if cost else {},
                    "host_s": cost.host_s if cost else None,
                    "kernel_s": cost.kernel_s if cost else None,
                    "unpriced_kernels": cost.unpriced if cost else None,
                    "failed": row.failed,
                }
            )
        out.append(_loop(plan, topology, title, notes, whole.get(plan.layout)))
    return out


def as_json(title: str, plans: Sequence[Plan], topology: Topology, notes: Sequence[str]) -> str:
    """The rows as JSON; what is not known is null."""
    return json.dumps(rows(title, plans, topology, notes), indent=1, allow_nan=False) + "\n"


COLORS = ("#4269d0", "#6cc5b0", "#efb118", "#ff725c", "#a463f2", "#97bbf5", "#3ca951", "#9c6b4e", "#9498a0")


def page(title: str, plans: Sequence[Plan], topology: Topology, notes: Sequence[str]) -> str:
    """A page of bars: memory by kind of every program, and the text."""
    bars = []
    for plan in rank(plans):
        bars.append(f"<h2>{html.escape(plan.layout)}</h2>")
        most = max([topology.chip.hbm, *(row.hbm_total for row in plan.rows)])
        for row in plan.rows:
            parts = "".join(
                f'<i style="width:{100 * row.hbm.get(kind, 0) / most:.2f}%;background:{color}" '
                f'title="{kind} {row.hbm.get(kind, 0) / 1e9:.2f} GB"></i>'
                for kind, color in zip(KINDS, COLORS, strict=True)
            )
            limit = f'<u style="left:{100 * topology.chip.hbm / most:.2f}%"></u>'
            mfu = f", MFU {row.mfu:.0%}" if row.flops and row.cost else ""
            label = f"{row.program}: {row.hbm_total / 1e9:.1f} GB, {_time(row.est_s)}{mfu}"
            bars.append(f"<p>{html.escape(label)}</p><div>{parts}{limit}</div>")
    legend = " ".join(f'<b style="color:{c}">&#9632;</b> {k}' for k, c in zip(KINDS, COLORS, strict=True))
    return (
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>'
        "body{font:14px system-ui;max-width:60em;margin:2em auto;padding:0 1em}p{margin:.6em 0 .1em}"
        "div{position:relative;background:#eee;height:1.2em}i{float:left;height:100%}"
        "u{position:absolute;top:-2px;bottom:-2px;border-left:2px solid #c00}pre{overflow:auto}</style>"
        f"<h1>{html.escape(title)}</h1><p>{legend} | red: what a device has, {topology.chip.hbm / 1e9:.1f} GB</p>"
        f"{''.join(bars)}<pre>{html.escape(text(title, plans, topology, notes))}</pre>\n"
    )
