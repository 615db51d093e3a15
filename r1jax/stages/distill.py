"""Distillation (R1 report, sections 2.4 and 4.1): a small dense model learns from what R1 wrote, without any RL.

The report's students are base models of Qwen2.5 and Llama, fine-tuned on the curated samples of Dev3. Its comparison is
the same student by RL alone, which loses on every benchmark; here that is another stage of the same run, on the page
reasoning_rl (configs/distill.py), and this page says which of the two did better on what, and at what cost.
"""

import pathlib

from ml_collections import ConfigDict

from r1jax import hosts, run_folder
from r1jax.fine_tune import fine_tune
from r1jax.run import Policy, Run

KEY = "config.sft.data"
# What an evaluation measured on each set, a share of the best: field -> name.
MEASURES = {
    "pass_at_1": "pass@1",
    "cons_at_k": "majority vote",
    "language_consistency": "in the question's language",
    "general_worth": "worth of general instructions",
}


def check(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Raises ValueError where the conversations are missing, and no stage of this run can still write them."""
    path = pathlib.Path(config.sft.data)
    if not path.is_file() and path.absolute().parent != workdir / "data":
        raise ValueError(
            f"{KEY} is {config.sft.data!r}, which is not there; a run of R1 leaves its conversations in "
            "WORKDIR/data/dev3.jsonl: python -m r1jax.main --config=configs/r1.py --workdir=runs/r1"
        )


def measures(record: run_folder.Record) -> dict[str, float]:
    """What an evaluation measured, by name; problems also by their language."""
    found = {name: record[field] for field, name in MEASURES.items() if field in record}
    languages = record.get("by_language", {})
    return found | {f"pass@1 of {name}": part["pass_at_1"] for name, part in languages.items() if len(languages) > 1}


def comparison(ours: run_folder.Record, theirs: run_folder.Record, cost: float) -> str:
    """One line on two evaluations; `cost` is the other's training over ours, in operations."""
    mine, other = measures(ours), measures(theirs)
    pairs = ", ".join(f"{name} {mine[name]:.1%} to {other[name]:.1%}" for name in mine if name in other)
    lost = [name for name in mine if name in other and mine[name] <= other[name]]
    verdict = f"not better in {', '.join(lost)}" if lost else "better on every measured set"
    fair = "" if cost >= 1 else "; that is less, so give it more: config.pipeline.NAME.rl.updates"
    name = theirs["stage"]
    return f"{ours['stage']} against {name}, which had {cost:.2f} of its operations{fair}: {pairs}; {verdict}"


def stage(run: Run, config: ConfigDict, policy: Policy) -> Policy:
    """Trains the student on config.sft.data; leaves a released-model folder in WORKDIR/models and WORKDIR/report.html.

    Raises:
        ValueError: no conversation there that fits.
    """
    student = fine_tune(run, config, policy, config.sft.data, KEY)
    spent = run_folder.read_run(run.workdir, with_completions=False).training_flops
    last = {record["stage"]: record for record in run.summary.evals if "benchmark" not in record}
    for other in (name for name in config.stages if name != run.stage):
        if {other, run.stage} <= last.keys() and spent(other):
            hosts.say(comparison(last[run.stage], last[other], spent(other) / spent(run.stage)))
    return student
