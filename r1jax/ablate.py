"""Named ablations of one training config, run in turn over several seeds, and one table of what they changed:

    python -m r1jax.ablate --config=configs/zero.py --ablations=no_kl,no_std --seeds=0,1,2 --workdir=DIR

Further flags are --config.KEY=VALUE. The config without an ablation is always the first row, "base". Every run lies in
DIR/NAME/seed_N, with its output in log.txt; one that has finished is not run again, one that was cut short goes on, so
the same command ends the work that is left. The table (text and JSON) is written anew after every run. On several hosts
run the single commands instead.
"""

import argparse
import json
import pathlib
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from r1jax import hosts
from r1jax.main import load_config

BASE = "base"

# What the table shows of a run's last evaluation: field, heading, format.
MEASURES = (
    ("pass_at_1", "pass@1", "{:.1%}"),
    ("cons_at_k", "majority", "{:.1%}"),
    ("pass_at_k", "pass@k", "{:.1%}"),
    ("mean_completion_tokens", "tokens", "{:.1f}"),
    ("reflective_per_completion", "reflective", "{:.2f}"),
    ("truncated_share", "cut off", "{:.1%}"),
    ("update_s", "s/update", "{:.1f}"),
    ("peak_rss_gb", "peak GB", "{:.2f}"),
    ("minutes", "minutes", "{:.1f}"),
)

Record = dict[str, Any]


def folder_of(workdir: pathlib.Path, name: str, seed: int) -> pathlib.Path:
    """Where the run of an ablation and a seed lies."""
    return workdir / name / f"seed_{seed}"


def command(config: str, name: str, seed: int, folder: pathlib.Path, rest: Sequence[str]) -> list[str]:
    """What to run; `rest` are further --config.KEY=VALUE."""
    spec = config if name == BASE else f"{config}:{name}"
    return [
        sys.executable,
        "-m",
        "r1jax.main",
        f"--config={spec}",
        f"--workdir={folder}",
        f"--config.seed={seed}",
        *rest,
    ]


def is_finished(folder: pathlib.Path, words: Sequence[str]) -> bool:
    """Whether this very command has run to its end there.

    Raises:
        ValueError: another command has.
    """
    done = folder / "finished.json"
    if not done.exists():
        return False
    before = json.loads(done.read_text("utf-8"))
    if before != list(words[1:]):
        raise ValueError(f"{folder} holds the run of another command ({' '.join(before)}); choose another --workdir")
    return True


def measured(folder: pathlib.Path) -> Record:
    """The last evaluation of a finished run, its minutes, its peak memory and the seconds of an update.

    Raises:
        ValueError: it was not evaluated.
    """
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    evals = [one for one in summary["evals"] if "benchmark" not in one]
    if not evals:
        raise ValueError(f"the run in {folder} was not evaluated: set config.eval.problems above 0")
    spent = {"minutes": summary["wall_s"] / 60, "peak_rss_gb": summary["peak_rss_gb"], "update_s": update_s(folder)}
    return {**evals[-1], **spent}


def update_s(folder: pathlib.Path) -> float | None:
    """Seconds of an update with its share of the rollout: the median over rollouts; None where nothing was logged."""
    path = folder / "metrics.jsonl"
    records = map(json.loads, path.read_text("utf-8").splitlines()) if path.exists() else ()
    rollouts: list[list[float]] = []
    for record in records:
        if "time/rollout_s" in record:
            rollouts.append([])
        if rollouts:
            rollouts[-1].append(sum(value for name, value in record.items() if name.startswith("time/")))
    return statistics.median(map(statistics.fmean, rollouts)) if rollouts else None


def spread(values: Sequence[float]) -> Record:
    """Mean, and the standard deviation between seeds (null for one seed)."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": deviation, "values": list(values)}


def table(runs: Mapping[str, Mapping[int, Record]]) -> list[Record]:
    """One row per ablation from its runs by seed: each measure, and pass@1 beside base's of the same seeds."""
    rows = []
    for name, by_seed in runs.items():
        row: Record = {"ablation": name, "seeds": list(by_seed)}
        for field, _, _ in MEASURES:
            values = [run[field] for run in by_seed.values() if run.get(field) is not None]
            row[field] = spread(values) if values else None
        pairs = [run["pass_at_1"] - runs[BASE][s]["pass_at_1"] for s, run in by_seed.items() if s in runs.get(BASE, {})]
        row["pass_at_1_less_base"] = spread(pairs) if pairs and name != BASE else None
        rows.append(row)
    return rows


def as_text(rows: Sequence[Record]) -> str:
    """The table for people: mean ± standard deviation between seeds."""

    def cell(entry: Record | None, form: str) -> str:
        if entry is None:
            return "-"
        return form.format(entry["mean"]) + (f" ± {form.format(entry['std'])}" if entry["std"] is not None else "")

    columns = [*MEASURES[:1], ("pass_at_1_less_base", "less base", "{:+.1%}"), *MEASURES[1:]]
    lines = [["ablation", "seeds", *(heading for _, heading, _ in columns)]]
    for row in rows:
        cells = [cell(row[field], form).replace("± +", "± ") for field, _, form in columns]
        lines.append([row["ablation"], str(len(row["seeds"])), *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        [text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    )
    return "\n".join("  ".join(line).rstrip() for line in padded) + "\n"


def run_one(words: Sequence[str], folder: pathlib.Path) -> int:
    """Runs a command to its end, its output in the folder's log.txt; SIGTERM and Ctrl-C reach it as well."""
    folder.mkdir(parents=True, exist_ok=True)
    with (
        open(folder / "log.txt", "ab") as log,
        subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            while True:
                try:
                    code = process.wait()
                    break
                except KeyboardInterrupt:  # the run got it too, and saves
                    continue
        finally:
            signal.signal(signal.SIGTERM, before)
    if code == 0:
        hosts.atomic_write(folder / "finished.json", json.dumps(words[1:]))
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 1 when a run failed."""
    parser = argparse.ArgumentParser(prog="r1jax.ablate", description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="config file, such as configs/zero.py")
    parser.add_argument("--ablations", default="", help="names of configs/ablations.py, with commas between")
    parser.add_argument("--seeds", default="0", help="numbers, with commas between")
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="folder of all runs and of the table")
    asked, rest = parser.parse_known_args(argv)
    names = [BASE, *filter(None, asked.ablations.split(","))]
    try:
        seeds = [int(seed) for seed in asked.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds={asked.seeds}: wanted numbers with commas between")
    for word in rest:
        if not word.startswith("--config.") or word.startswith("--config.seed"):
            parser.error(f"what is {word}? Keys are set by --config.KEY=VALUE, the seed by --seeds")
    runs: dict[str, dict[int, Record]] = {}
    failed = 0
    try:
        for name in names:
            load_config(asked.config if name == BASE else f"{asked.config}:{name}")  # a misspelt name ends it now
        # Seed by seed, so that a table of fewer seeds is whole when the work is cut short.
        for seed in seeds:
            for name in names:
                folder = folder_of(asked.workdir, name, seed)
                words = command(asked.config, name, seed, folder, rest)
                start_s = time.monotonic()
                code = 0 if is_finished(folder, words) else run_one(words, folder)
                took_s, end = time.monotonic() - start_s, "done" if code == 0 else f"code {code}"
                print(f"{name}, seed {seed}: {end}, {took_s:.0f} s", flush=True)
                if code == hosts.TRY_AGAIN:
                    return code
                if code:
                    failed = 1
                    print("\n".join((folder / "log.txt").read_text("utf-8", "replace").splitlines()[-5:]), flush=True)
                    continue
                runs.setdefault(name, {})[seed] = measured(folder)
                rows = table(runs)
                hosts.atomic_write(asked.workdir / "ablations.json", json.dumps(rows, indent=1) + "\n")
                hosts.atomic_write(asked.workdir / "ablations.txt", as_text(rows))
    except (ValueError, OSError) as error:
        sys.exit(f"r1jax: {error}")
    if runs:
        print(f"\n{(asked.workdir / 'ablations.txt').read_text('utf-8')}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
