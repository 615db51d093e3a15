r"""How far the math verifier can be trusted and how fast it is: `python -m tests.bench.verifier`.

Prints false accepts and false rejects on the labelled examples by tier and source, every wrong one by name; the
references of each data set against themselves and against a shuffled partner; cases per second beside math-verify
0.9; and how long two workers take for a rollout of 8,192 completions. math-verify is asked in a Python of its own,
because it is no dependency: MATH_VERIFY_PYTHON=/path/to/venv/bin/python, with `pip install math-verify==0.9.0`.
"""

import collections
import json
import os
import pathlib
import random
import subprocess
import sys
import time
from collections.abc import Callable

from r1jax.rewards import math
from r1jax.rewards.pool import RewardPool

DATA = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data"
SETS = "math500 math_rest4500 gsm8k_test gsm8k_train aime24 aime25 cmath_zh".split()
SHUFFLES = 10  # of each set against itself
COMPLETIONS = 8192
# A pass over the examples is short: the best of several, so that another process on the machine does not count.
PASSES = 5
THEIRS = """
import json, logging, sys, time
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
logging.disable(logging.CRITICAL)
cases = json.load(sys.stdin)
configs = (LatexExtractionConfig(), ExprExtractionConfig())
def grade(gold, completion):
    golds = parse("$" + gold + "$", configs, parsing_timeout=5)
    return bool(verify(golds, parse(completion, parsing_timeout=5), timeout_seconds=5))
grade("1/2", "0.5")
start_s = time.process_time()
verdicts = [grade(*case) for case in cases]
print(json.dumps([verdicts, time.process_time() - start_s]))
"""


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").open(encoding="utf-8")]


def completion(row: dict) -> str:
    return row["prediction"] if row["kind"] == "response" else rf"\boxed{{{row['prediction']}}}"


def ours(cases: list[tuple[str, str]]) -> tuple[list[bool], float]:
    best_s, verdicts = float("inf"), []
    for _ in range(PASSES):
        for cache in (math.read, math._values):  # a pass must not profit from the one before
            cache.cache_clear()
        start_s = time.process_time()
        verdicts = [math.grade(text, {"answer": gold}) for gold, text in cases]
        best_s = min(best_s, time.process_time() - start_s)
    return verdicts, best_s


def theirs(cases: list[tuple[str, str]]) -> tuple[list[bool], float] | str:
    python = os.environ.get("MATH_VERIFY_PYTHON", sys.executable)
    done = subprocess.run([python, "-c", THEIRS], input=json.dumps(cases), capture_output=True, text=True)
    if done.returncode:
        return f"skipped: {python}: {done.stderr.strip().splitlines()[-1]} (set MATH_VERIFY_PYTHON)"
    return tuple(json.loads(done.stdout))


def table(rows: list[dict], verdicts: list[bool]) -> None:
    counts: dict[tuple[str, str], collections.Counter] = collections.defaultdict(collections.Counter)
    for row, verdict in zip(rows, verdicts, strict=True):
        kind = "right" if verdict == row["equal"] else "false accept" if verdict else "false reject"
        source = row["source"].split(" ")[0].split("/")[-1] + (
            " ::" + s[-1] if len(s := row["source"].split("::")) > 1 else ""
        )
        counts[row["tier"], source][kind] += 1
        counts[row["tier"], "ALL"][kind] += 1
    print(f"{'tier':9} {'source':62} {'cases':>5} {'false accepts':>13} {'false rejects':>13} {'right':>7}")
    for (tier, source), count in sorted(counts.items()):
        n = count.total()
        share = f"{count['right'] / n:7.1%}"
        print(f"{tier:9} {source:62} {n:5} {count['false accept']:13} {count['false reject']:13} {share}")


def examples() -> None:
    rows = read("verifier_examples")
    cases = [(row["gold"], completion(row)) for row in rows]
    verdicts, seconds = ours(cases)
    table(rows, verdicts)
    for row, verdict in zip(rows, verdicts, strict=True):
        if verdict != row["equal"]:
            word = "accepts" if verdict else "rejects"
            print(f"  {row['id']} {row['tier']} {word}: {row['gold']!r} | {row['prediction'][-80:]!r} ({row['note']})")
    print(f"\nr1jax: {len(cases) / seconds:.0f} cases a second on one core")
    other = theirs(cases)
    if isinstance(other, str):
        print(f"math-verify {other}")
        return
    print(f"math-verify: {len(cases) / other[1]:.0f} cases a second on one core")
    print(f"r1jax is {other[1] / seconds:.0f} times as fast")
    table(rows, other[0])


def references() -> None:
    for name in SETS:
        golds = [str(row["answer"]) for row in read(name)]
        wrong = [gold for gold in golds if not math.grade(rf"<think>7</think> \boxed{{{gold}}}", {"answer": gold})]
        accepted = set()
        for seed in range(SHUFFLES if len(golds) < 4000 else SHUFFLES // 3):
            partners = random.Random(seed).sample(golds, len(golds))
            pairs = {(min(a, b), max(a, b)) for a, b in zip(golds, partners, strict=True) if a != b}
            accepted |= {pair for pair in pairs if math.equivalent(*pair)}
        print(f"{name}: {len(golds) - len(wrong)}/{len(golds)} equal themselves {wrong or ''}")
        print(f"  accepted of shuffled partners: {sorted(accepted)}")


def timed(label: str, work: Callable[[], None]) -> None:
    start_s = time.perf_counter()
    work()
    print(f"{label}: {time.perf_counter() - start_s:.1f} s of wall time")


def rollout() -> None:
    golds = [str(row["answer"]) for row in read("math500") + read("gsm8k_test")]
    thought = "Let me see. " * 400  # about a thousand tokens
    with RewardPool({"accuracy": 1.0, "format": 1.0}, 2, 10.0) as pool:

        def grade() -> None:
            for ticket in range(COMPLETIONS):
                gold, other = golds[ticket % len(golds)], golds[ticket * 7 % len(golds)]
                text = rf"<think>{thought}</think> <answer>\boxed{{{other}}}</answer>"
                pool.submit(ticket, "", text, {"id": ticket, "grader": "math", "answer": gold})
                pool.poll()
            graded = pool.drain()
            flags = collections.Counter(flag for g in graded for flag in g.flags)
            print(f"flags of the rollout: {dict(flags)}")

        timed(f"{COMPLETIONS} completions by two workers", grade)


if __name__ == "__main__":
    examples()
    references()
    rollout()
