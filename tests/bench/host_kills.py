"""Kills one of four hosts in every move, and continues: python -m tests.bench.host_kills --kills=20

The moves (rollout, grading, update, save) and the hosts take turns; the moment within a move is random. Prints for each
kill after how many seconds the last of the others had exited, whether all of them named the host, and the newest
checkpoint then. In the end everything that a run left has to be that of the run which nobody killed, bit for bit.
"""

import argparse
import os
import pathlib
import random
import sys
import tempfile
import time

from r1jax.checkpoint import latest_step
from tests.many_hosts import MOVES, Ended, run, start, wait
from tests.tiny_run import STAGE, arguments, make_policy, metrics, outcome

LIMIT_S = 60


def kill(n: int, words: list[str], victim: int, death: str) -> tuple[list[Ended], float | None]:
    """How the hosts of a life ended, and how long after the victim the last one; None: it died of nothing."""
    processes = start(n, words, R1JAX_DIE=f"{victim}|{death}")
    ends = wait(processes)
    if ends[victim].code != -9:
        return ends, None
    return ends, max(end.at_s for end in ends) - ends[victim].at_s


def describe(n: int, victim: int, ends: list[Ended]) -> str:
    """Whether each of the other hosts said who died, and with which code it ended."""
    others = [end for i, end in enumerate(ends) if i != victim]
    named = sum(f"host {victim} of {n}" in end.text and "died" in end.text for end in others)
    return f"{named} of {len(others)}  {' '.join(str(end.code) for end in others)}"


def main() -> None:
    """Runs once undisturbed, then again and again under fire until there were enough kills."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng, n, lives, good = random.Random(asked.seed), 0, 0, True
    with tempfile.TemporaryDirectory() as made:
        folder = pathlib.Path(made)
        make_policy(folder / "policy")
        os.environ |= {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

        def words(workdir: pathlib.Path) -> list[str]:
            return arguments(folder / "policy", workdir, rl__updates=asked.updates, grading__workers=1)

        def whole(workdir: pathlib.Path) -> None:
            ends = run(asked.hosts, words(workdir))
            if any(end.code for end in ends):
                sys.exit("\n".join(end.text for end in ends))

        begin_s = time.monotonic()
        whole(folder / "straight")
        print(f"undisturbed: {asked.updates} updates in {time.monotonic() - begin_s:.1f} s", flush=True)
        print("kill  host  move       exit s  named   codes     logged  checkpoint", flush=True)
        while n < asked.kills:
            killed = folder / f"killed{lives}"
            while n < asked.kills:
                move, victim = MOVES[n % 4], (n // 4 + n) % asked.hosts
                # The moves of a rollout; the next life begins at the checkpoint before.
                most = {"rollout": 2, "grading": 2, "update": 4, "save": 1}[move]
                death = f"{move}:{rng.randint(1, most)}:{rng.uniform(0, 0.2):.3f}"
                ends, exit_s = kill(asked.hosts, words(killed), victim, death)
                if exit_s is None:
                    if any(end.code for end in ends):
                        sys.exit("\n".join(end.text for end in ends))
                    print(f"      ended before {death}", flush=True)
                    break
                n += 1
                told = describe(asked.hosts, victim, ends)
                good &= exit_s < LIMIT_S and told.startswith(f"{asked.hosts - 1} of")
                logged = max((record["step"] for record in metrics(killed)), default=0)
                row = f"{n:4}  {victim:4}  {death:14} {exit_s:5.1f}  {told:18}  {logged:4}"
                print(f"{row}  {latest_step(killed / 'checkpoints' / STAGE)!s:>10}", flush=True)
                if not told.startswith(f"{asked.hosts - 1} of"):
                    print("\n".join(f"--- host {i}: {end.text[-3000:]}" for i, end in enumerate(ends)), flush=True)
            else:
                whole(killed)
            one, other = outcome(folder / "straight"), outcome(killed)
            same = {what: one[what] == other[what] for what in one}
            print(*(f"{what} {'identical' if same[what] else 'DIFFERENT'}" for what in same), sep=", ", flush=True)
            good, lives = good and all(same.values()), lives + 1
    sys.exit(not good)


if __name__ == "__main__":
    main()
