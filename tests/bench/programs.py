"""The reference programs of HumanEval and MBPP in the sandbox, and programs a second: python -m tests.bench.programs

Every reference has to pass its tests inside. The speed is that of `--workers` processes (default 2) after warm-up, each
with a sandbox of its own; a program counts once however many tests it has.
"""

import argparse
import json
import multiprocessing
import pathlib
import time

from r1jax.rewards.code import run_tests

DATA = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data"
Problem = tuple[str, str, list[str]]  # id, program, tests


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").open(encoding="utf-8")]


def problems(name: str) -> list[Problem]:
    if name == "humaneval":
        return [
            (row["id"], row["prompt"] + row["solution"], [f"{row['test']}\ncheck({row['entry_point']})"])
            for row in read(name)
        ]
    # The order that MBPP's authors mean: solution, set-up, tests.
    return [(row["id"], f"{row['solution']}\n{row['setup']}", row["tests"]) for row in read(name)]


def grade(problem: Problem) -> tuple[str, tuple[str, ...], str, float]:
    start_s = time.perf_counter()
    report = run_tests(problem[1], problem[2], timeout_s=180.0)  # one of MBPP takes ten seconds on an idle core
    return problem[0], report.verdicts, next(filter(None, report.messages), ""), time.perf_counter() - start_s


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    workers = parser.parse_args().workers
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(grade, problems("humaneval")[: 4 * workers], chunksize=1)
        for name in ("humaneval", "mbpp"):
            todo = problems(name)
            start_s = time.perf_counter()
            results = pool.map(grade, todo, chunksize=8)
            seconds = time.perf_counter() - start_s
            failed = [result for result in results if set(result[1]) != {"passed"}]
            runs = sum(len(verdicts) for _, verdicts, _, _ in results)
            slowest = sorted(results, key=lambda result: -result[3])[:5]
            print(f"{name}: {len(todo) - len(failed)}/{len(todo)} pass; {len(todo) / seconds:.0f} programs a second")
            print(f"  ({runs / seconds:.0f} tests a second, {workers} processes)", *failed, sep="\n  ")
            print("  slowest: " + ", ".join(f"{name} {seconds:.1f} s" for name, _, _, seconds in slowest), flush=True)


if __name__ == "__main__":
    main()
