"""Several processes as the hosts of one run, and one of them killed in a move of its choice.

    python -m tests.many_hosts ARGUMENTS OF r1jax.main

is r1jax.main, except that R1JAX_DIE=MOVE:NUMBER:SECONDS has the process kill itself so long after the NUMBER-th time
that it enters the move (rollout, grading, update or save), R1JAX_STALL=NUMBER has its first gradings stall, and
R1JAX_FLAG is one more argument.
"""

import dataclasses
import functools
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parent.parent
MOVES = ("rollout", "grading", "update", "save")


@dataclasses.dataclass
class Ended:
    """How a host ended: its exit code (negative: by that signal), what it printed, and when, by time.monotonic()."""

    code: int
    text: str
    at_s: float


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(n: int, arguments: list[str], devices: int = 4, **environment: str) -> list[subprocess.Popen]:
    """The command on `n` hosts, `devices` of them together. A value of `environment` with a bar is HOST|VALUE."""
    shared = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    shared.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if n > 1:
        shared |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": str(n)}
    words = [sys.executable, "-m", "tests.many_hosts", *arguments, f"--config.cpu_devices={devices // n}"]

    def one(index: int) -> subprocess.Popen:
        own = {"JAX_PROCESS_ID": str(index)} if n > 1 else {}
        for key, value in environment.items():
            host, _, text = value.rpartition("|")
            if host in ("", str(index)):
                own[key] = text
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        return subprocess.Popen(words, cwd=ROOT, env={**shared, **own}, **pipe)

    return [one(index) for index in range(n)]


def wait(hosts: list[subprocess.Popen], timeout_s: float = 600) -> list[Ended]:
    """How they ended; what still runs after `timeout_s` is killed."""
    ends: list[Ended | None] = [None] * len(hosts)

    def read(i: int) -> None:
        text = hosts[i].communicate()[0]
        ends[i] = Ended(hosts[i].returncode, text, time.monotonic())

    readers = [threading.Thread(target=read, args=(i,)) for i in range(len(hosts))]
    for reader in readers:
        reader.start()
    until_s = time.monotonic() + timeout_s
    for reader in readers:
        reader.join(max(0.0, until_s - time.monotonic()))
    for host in hosts:
        host.kill()
    for reader in readers:
        reader.join()
    return ends


def run(n: int, arguments: list[str], devices: int = 4, timeout_s: float = 600, **environment: str) -> list[Ended]:
    """Starts the command on `n` hosts and waits for them."""
    return wait(start(n, arguments, devices, **environment), timeout_s)


def _die_in(move: str, number: int, after_s: float) -> None:
    from r1jax import checkpoint, metrics
    from r1jax.rewards.pool import RewardPool

    entered = 0

    def enter() -> None:
        nonlocal entered
        entered += 1
        if entered == number:
            threading.Timer(after_s, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()

    def noted(function: Callable, is_it: Callable[..., bool] = lambda *_: True) -> Callable:
        @functools.wraps(function)
        def call(*positional: object, **named: object) -> object:
            if is_it(*positional):
                enter()
            return function(*positional, **named)

        return call

    if move == "grading":
        RewardPool.drain = noted(RewardPool.drain)
    elif move == "save":
        checkpoint.Checkpoints._finish = noted(checkpoint.Checkpoints._finish)
    else:
        metrics.Moves.__call__ = noted(metrics.Moves.__call__, lambda _, name: name == move)


def _stall(number: int) -> None:
    from r1jax.rewards.children import KillablePool

    submit, seen = KillablePool.submit, 0

    def slow(self: KillablePool, ticket: int, payload: tuple) -> None:
        nonlocal seen
        seen += 1
        prompt, completion, example = payload
        submit(self, ticket, (prompt, "STALL" if seen <= number else completion, example))

    KillablePool.submit = slow


def main() -> None:
    """The command, with what the environment asks for."""
    if asked := os.environ.get("R1JAX_DIE"):
        move, number, after_s = asked.split(":")
        _die_in(move, int(number), float(after_s))
    if asked := os.environ.get("R1JAX_STALL"):
        _stall(int(asked))
    from r1jax.main import cli

    sys.argv += filter(None, [os.environ.get("R1JAX_FLAG")])
    cli()


if __name__ == "__main__":
    main()
