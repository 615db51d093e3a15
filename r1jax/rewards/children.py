"""Runs untrusted-in-time functions in child processes that can be killed, for a parent that runs threads and JAX.

A time-out by signal or thread in the parent cannot stop C code, and a fork of a process with threads may deadlock; so
each child is a fresh interpreter (subprocess, no fork handlers, no import of the parent's main module). A child works
on one small batch at a time and answers item by item: when it hangs, or dies twice, only the item it was at is lost.
"""

import collections
import contextlib
import dataclasses
import json
import math
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import time
from typing import Any

# Fresh interpreters on a busy machine, with whatever the user's module imports.
START_TIMEOUT_S = 120.0
START_ATTEMPTS = 3
# The child's own alarm ends an item in time; the parent steps in this much later if the item has disabled it.
GRACE_S = 1.0
MAX_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one item: fate is "" and `value` what the function returned; or "timeout", "died" or "late"."""

    ticket: int
    value: Any
    fate: str
    seconds: float


@dataclasses.dataclass(eq=False)
class _Child:
    process: subprocess.Popen
    connection: socket.socket
    deadline_s: float
    ready: bool = False
    heard_s: float = 0.0
    unread: bytes = b""
    batch: collections.deque[int] = dataclasses.field(default_factory=collections.deque)


class KillablePool:
    """Child processes, started once, that apply one function to submitted payloads. Not to be shared between threads.

    setup: "package.module:factory"; in the child `factory(*arguments)` gives the function. Its values must be JSON.
    timeout_s: for one item; a child that takes longer is killed and replaced.
    """

    def __init__(self, setup: str, arguments: tuple, workers: int, timeout_s: float) -> None:
        assert workers > 0, workers
        self._setup = pickle.dumps((setup, arguments, timeout_s))
        self._workers, self._timeout_s = workers, timeout_s
        self._payloads: dict[int, bytes] = {}  # submitted and not answered
        self._queue: collections.deque[int] = collections.deque()  # of these, the ones no child has
        # At work on these a child died once. They are tried again: the kernel, short of memory, kills the innocent too.
        self._suspects: set[int] = set()
        self._outcomes: list[Outcome] = []
        self._failed_starts = 0
        self._selector = selectors.DefaultSelector()
        self._children: set[_Child] = set()
        try:
            for _ in range(workers):
                self._start()
            while not all(child.ready for child in self._children):
                self._advance(self._until_deadline_s())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "KillablePool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(self, ticket: int, payload: Any) -> None:
        """Queues one item; `ticket` names it in its Outcome and must differ from those of all unanswered items."""
        assert ticket not in self._payloads, f"ticket {ticket} is already submitted"
        self._payloads[ticket] = pickle.dumps(payload)
        self._queue.append(ticket)
        self._dispatch()

    def poll(self) -> list[Outcome]:
        """The outcomes that have come in since the last call, by ticket; does not wait."""
        self._advance(0.0)
        return self._take()

    def drain(self, limit_s: float = math.inf) -> list[Outcome]:
        """Waits until every submitted item is answered or lost, then as `poll`.

        What is not answered after `limit_s` of waiting is lost with the fate "late", and its children are replaced.
        """
        end_s = time.monotonic() + limit_s
        while self._payloads:
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                self._give_up()
                break
            self._advance(min(self._until_deadline_s(), left_s))
        return self._take()

    def _give_up(self) -> None:
        for child in [child for child in self._children if child.batch]:
            self._kill(child)
            self._start()
        self._queue.clear()
        for ticket in list(self._payloads):
            self._finish(Outcome(ticket, None, "late", 0.0))

    def close(self) -> None:
        """Kills the children; what they have not answered is forgotten."""
        for child in list(self._children):
            self._kill(child)
        self._selector.close()
        self._payloads.clear()

    def _take(self) -> list[Outcome]:
        outcomes, self._outcomes = sorted(self._outcomes, key=lambda outcome: outcome.ticket), []
        return outcomes

    def _until_deadline_s(self) -> float:
        return max(min(child.deadline_s for child in self._children) - time.monotonic(), 0.0)

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        # The paths of the parent, and nothing of its main module, which may import jax and take the TPU.
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from r1jax.rewards.child import serve; serve({theirs.fileno()})"
        )
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
                # A SIGINT or SIGTERM to the run's process group is for the run, which may still want its rewards.
                start_new_session=True,
            )
        ours.settimeout(START_TIMEOUT_S)
        child = _Child(process, ours, time.monotonic() + START_TIMEOUT_S)
        self._children.add(child)
        self._selector.register(ours, selectors.EVENT_READ, child)
        self._send(child, self._setup)

    def _send(self, child: _Child, message: bytes) -> bool:
        try:
            child.connection.sendall(message)
        except OSError:  # it died while it was idle, or stopped reading: to be replaced at once
            child.deadline_s = 0.0
            return False
        return True

    def _dispatch(self) -> None:
        for child in self._children:
            if not self._queue:
                return
            if not child.ready or child.batch:
                continue
            # Large batches while there is much to do, single items in the end, so that all children finish together.
            size = min(math.ceil(len(self._queue) / (2 * self._workers)), MAX_BATCH)
            tickets = [self._queue.popleft() for _ in range(size)]
            if self._send(child, pickle.dumps([(ticket, self._payloads[ticket]) for ticket in tickets])):
                child.batch.extend(tickets)
                self._heard(child)
            else:
                self._queue.extendleft(reversed(tickets))

    def _heard(self, child: _Child) -> None:
        child.heard_s = time.monotonic()
        child.deadline_s = child.heard_s + self._timeout_s + GRACE_S if child.batch else math.inf

    def _advance(self, wait_s: float) -> None:
        for key, _ in self._selector.select(None if math.isinf(wait_s) else wait_s):
            self._receive(key.data)
        for child in list(self._children):
            if child.deadline_s <= time.monotonic():
                self._replace(child, hung=True)
        self._dispatch()

    def _receive(self, child: _Child) -> None:
        try:
            data = child.connection.recv(1 << 20)
        except OSError:
            data = b""
        *lines, child.unread = (child.unread + data).split(b"\n")
        for line in map(json.loads, lines):
            if line == "ready":
                child.ready, self._failed_starts = True, 0
            elif isinstance(line, dict):
                self.close()
                raise RuntimeError(f"a grading process failed outside of any item:\n{line['failed']}")
            else:
                ticket, value, seconds = line
                assert child.batch.popleft() == ticket
                self._finish(Outcome(ticket, value, "", seconds))
        if not data:
            self._replace(child, hung=False)
        elif child.ready:
            self._heard(child)

    def _finish(self, outcome: Outcome) -> None:
        del self._payloads[outcome.ticket]
        self._suspects.discard(outcome.ticket)
        self._outcomes.append(outcome)

    def _replace(self, child: _Child, hung: bool) -> None:
        code = self._kill(child)
        if not child.ready:
            self._failed_starts += 1
            if self._failed_starts == START_ATTEMPTS:
                self.close()
                raise RuntimeError(
                    f"{START_ATTEMPTS} grading processes in succession did not start: the last one "
                    + (f"was not ready in {START_TIMEOUT_S:.0f} s" if hung else f"ended with exit code {code}")
                    + "; what they wrote to standard error stands above"
                )
        elif child.batch:
            suspect = child.batch[0]
            fate = "timeout" if hung or code in (-signal.SIGALRM, -signal.SIGPROF) else "died"
            if fate == "died" and suspect not in self._suspects:
                self._suspects.add(suspect)
            else:
                child.batch.popleft()
                self._finish(Outcome(suspect, None, fate, time.monotonic() - child.heard_s))
            self._queue.extendleft(reversed(child.batch))
        self._start()

    def _kill(self, child: _Child) -> int | None:
        """Ends the child and all that it has started; its exit code as subprocess gives it, None if it will not go."""
        self._children.discard(child)
        self._selector.unregister(child.connection)
        child.connection.close()
        # Before it is waited for: until then no other process can get its number.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.process.pid, signal.SIGKILL)
        try:
            return child.process.wait(timeout=10.0)
        except subprocess.TimeoutExpired:  # stuck in the kernel
            return None
