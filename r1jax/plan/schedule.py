"""The report's schedule in parts, each with its longest completion: what one plan covers, and several together."""

import importlib
import math
from collections.abc import Sequence
from typing import Any

from r1jax.plan.account import Plan


def parts() -> dict[int, int]:
    """Updates by max_completion_tokens, as reported: 8,200 at 32,768 and 2,200 at 65,536."""
    rl = importlib.import_module("configs.base").get_config().rl
    starts = [(0, rl.max_completion_tokens), *rl.length_schedule]
    ends = [at for at, _ in starts[1:]] + [rl.updates]
    return {tokens: end - at for (at, tokens), end in zip(starts, ends, strict=True)}


def updates(rl: Any) -> int:
    """How many updates of config.rl's run a plan covers: of the report's only those of its length, of another all."""
    reported = parts()
    if rl.updates != sum(reported.values()) or rl.length_schedule:
        return rl.updates
    return reported.get(rl.max_completion_tokens, rl.updates)


def covered(plan: Plan) -> str:
    """Which updates the hours of a plan are for, in words."""
    reported = parts()
    said = f"{plan.run_updates:,} updates at up to {plan.longest:,} tokens"
    if reported.get(plan.longest) == plan.run_updates:
        said += f", of the report's {sum(reported.values()):,}"
    return said


def together(plans: Sequence[Plan]) -> dict[str, float]:
    """Hours of the report's whole schedule, for each layout of which every part was planned."""
    reported, out = parts(), {}
    for layout in dict.fromkeys(plan.layout.partition(":")[0] for plan in plans):
        hours: dict[int, float] = {}
        for plan in plans:
            is_part = reported.get(plan.longest) == plan.run_updates and not math.isnan(plan.run_hours)
            if plan.layout.partition(":")[0] == layout and is_part:
                hours.setdefault(plan.longest, plan.run_hours)
        if hours.keys() == reported.keys():
            out[layout] = sum(hours.values())
    return out
