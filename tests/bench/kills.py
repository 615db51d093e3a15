"""Kills a small run at random moments and continues it: python -m tests.bench.kills --kills=20

Prints when each life ended and what stood on disk then. In the end everything that a run left (policy, metrics,
rollouts, evaluations) has to be that of the run which nobody killed, bit for bit; a run that reaches its end before it
is killed again is compared at once, and the next one begins. Every third kill waits for a checkpoint being written.
"""

import argparse
import os
import pathlib
import random
import sys
import tempfile
import time

from r1jax.checkpoint import latest_step
from tests.tiny_run import STAGE, arguments, command, make_policy, metrics, outcome, run_main


def half_written(saved: pathlib.Path) -> set[str]:
    """Steps whose checkpoint has begun but does not exist yet."""
    folders = saved.iterdir() if saved.is_dir() else ()
    return {path.name for path in folders if path.name.isdigit() and not any(path.glob("manifest-*"))}


def kill(words: list[str], workdir: pathlib.Path, wait_s: float, in_a_save: bool) -> str | None:
    """Starts the command and kills it after `wait_s`, or at the next save from then on; None if it ended before."""
    saved, start_s = workdir / "checkpoints" / STAGE, time.monotonic()
    before = half_written(saved)  # what an earlier kill left is cleared away by the next save
    process = command(*words)
    while process.poll() is None:
        if time.monotonic() - start_s >= wait_s and (not in_a_save or half_written(saved) - before):
            process.kill()
            after_s = time.monotonic() - start_s
            process.communicate()
            logged = max((record["step"] for record in metrics(workdir)), default=0)
            half = " ".join(half_written(saved) - before)
            return f"{after_s:7.2f}  {logged:12}  {latest_step(saved)!s:>10}  {half:>12}"
        time.sleep(0.001)
    finished(process.returncode, process.communicate()[0])
    return None


def finished(code: int, text: str) -> None:
    """Stops with what the run printed if it did not end well."""
    if code:
        sys.exit(text)


def is_alike(straight: pathlib.Path, killed: pathlib.Path) -> bool:
    """Compares and prints what is alike."""
    one, other = outcome(straight), outcome(killed)
    print(*(f"{what} {'identical' if one[what] == other[what] else 'DIFFERENT'}" for what in one), sep=", ", flush=True)
    return one == other


def main() -> None:
    """Runs once undisturbed, then again and again under fire until there were enough kills."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng, n, alike = random.Random(asked.seed), 0, []
    with tempfile.TemporaryDirectory() as made:
        folder = pathlib.Path(made)
        make_policy(folder / "policy")
        os.environ |= {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        }

        def words(workdir: pathlib.Path) -> list[str]:
            return arguments(folder / "policy", workdir, rl__updates=asked.updates)

        finished(*run_main(*words(folder / "compiling")))  # fills the compilation cache
        start_s = time.monotonic()
        finished(*run_main(*words(folder / "straight")))
        life_s = time.monotonic() - start_s
        print(f"undisturbed: {asked.updates} updates in {life_s:.1f} s", flush=True)
        print("kill  after s  steps logged  checkpoint  half-written", flush=True)
        while n < asked.kills:
            killed, row = folder / f"killed{len(alike)}", ""
            while row is not None and n < asked.kills:
                row = kill(words(killed), killed, rng.uniform(0, life_s), n % 3 == 2)
                n += row is not None
                print(f"{n:4}  {row}" if row else "      ended before it was killed", flush=True)
            if row is not None:
                finished(*run_main(*words(killed)))
            alike.append(is_alike(folder / "straight", killed))
    sys.exit(not all(alike))


if __name__ == "__main__":
    main()
