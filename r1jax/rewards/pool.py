"""The weighted sum of rewards over completions, graded in child processes while others still decode.

Rule-based rewards only, as R1-Zero uses them (DeepSeek-R1, arXiv 2501.12948, section 2.2). Whatever a reward does, it
costs at most its own item: raising, hanging, returning NaN or ending its process gives a reward of 0.0 and a flag.
"""

import dataclasses
import logging
import math
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from r1jax.rewards import code
from r1jax.rewards.children import KillablePool, Outcome
from r1jax.rewards.table import canonical_answer, resolve

log = logging.getLogger(__name__)

Item = tuple[str, str, Mapping[str, Any]]  # prompt, completion, example


@dataclasses.dataclass(frozen=True)
class Graded:
    """What grading found out about one completion.

    rewards are not weighted, `reward` is their weighted sum. answer is what a majority vote counts, None if there is
    none or the example's grader is unknown. flags: "error:NAME" or "nan:NAME" for a reward that raised or did not
    return a finite number and counts 0.0 ("error:answer" if the answer could not be had); "timeout" or "died" for an
    item whose process was lost, "late" for one whose batch took too long, all of whose rewards are 0.0. seconds: wall
    time of grading this item.
    """

    ticket: int
    rewards: dict[str, float]
    reward: float
    answer: str | None
    flags: tuple[str, ...]
    seconds: float


def _finite(value: Any) -> float | None:
    """A number of any library as a float; None if it is not finite or not a number."""
    if isinstance(value, str | bytes):
        return None
    try:
        number = float(value)
    except Exception:  # a strange object may raise anything
        return None
    return number if math.isfinite(number) else None


def item_grader(
    sources: dict[str, str], sandbox_accepts: tuple[str, ...] = (), marked_answers: bool = False
) -> Callable[[Item], tuple]:
    """A function from an item to its rewards by name, canonical answer, flags, and the tracebacks of flags new to it.

    sources: where `resolve` finds each reward. A child process makes its own of it. marked_answers: goes to the rewards
    as their context.
    """
    code.accept_missing(sandbox_accepts)
    functions = {name: resolve(source) for name, source in sources.items()}
    seen: set[str] = set()

    def grade(item: Item) -> tuple[dict[str, float], str | None, list[str], dict[str, str]]:
        rewards, flags, tracebacks = {}, [], {}

        def guarded(name: str, function: Callable, default: Any) -> Any:
            try:
                return function(*item, marked_answers=marked_answers)
            except KeyboardInterrupt:
                raise
            except BaseException:  # also SystemExit and asyncio's CancelledError
                flags.append(f"error:{name}")
                if flags[-1] not in seen:
                    seen.add(flags[-1])
                    tracebacks[flags[-1]] = traceback.format_exc()
                return default

        for name, function in functions.items():
            value = _finite(guarded(name, function, 0.0))
            if value is None:
                flags.append(f"nan:{name}")
            rewards[name] = value or 0.0
        return rewards, guarded("answer", canonical_answer, None), flags, tracebacks

    return grade


class RewardPool:
    """Grades completions by the weighted sum of `rewards` in child processes, started once and kept warm.

    rewards: weight by name; a name of table.REWARDS, a key of `paths`, or an import path itself.
    workers: number of processes. 0 grades inside `submit`, for debugging: nothing then stops a reward that hangs.
    timeout_s: for all rewards of one completion together; wall time.
    paths: where rewards of the user's own names are, as "package.module:function" or "path/to/file.py:function".
    batch_timeout_s: how long `drain` waits for all that is submitted.
    sandbox_accepts: layers of the sandbox that this machine may lack; without them programs are not run.
    marked_answers: an answer in text counts only where it is marked as such; see table.accuracy.

    What a reward prints is discarded. To be used from one thread.

    Raises:
      ValueError: an unknown reward, a weight that is no finite number, no reward at all.
      RuntimeError: the processes cannot be started.
    """

    def __init__(
        self,
        rewards: Mapping[str, float],
        workers: int,
        timeout_s: float,
        paths: Mapping[str, str] | None = None,
        batch_timeout_s: float = math.inf,
        sandbox_accepts: tuple[str, ...] = (),
        marked_answers: bool = False,
    ) -> None:
        if not rewards:
            raise ValueError("config.rewards is empty: name at least one reward and its weight, such as accuracy=1.0")
        for name, weight in rewards.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                raise ValueError(f"the weight of {name!r} in config.rewards is {weight!r}, wanted a finite number")
        if unused := sorted((paths or {}).keys() - rewards.keys()):
            raise ValueError(f"config.reward_paths has {unused[0]!r}, which config.rewards gives no weight")
        if workers < 0 or not 0 < timeout_s < math.inf or not batch_timeout_s > 0:
            raise ValueError(
                "grading needs workers >= 0, a finite timeout_s > 0 and batch_timeout_s > 0, but "
                f"workers={workers}, timeout_s={timeout_s}, batch_timeout_s={batch_timeout_s}"
            )
        self._batch_timeout_s = batch_timeout_s
        self._weights = dict(rewards)
        sources = {name: (paths or {}).get(name, name) for name in rewards}
        # Also where children grade: a mistake in the config is found here, in the process that the user looks at.
        given = (sources, sandbox_accepts, marked_answers)
        self._grade = item_grader(*given)
        self._inline: list[Outcome] = []
        self._logged: set[str] = set()
        self._pool = None
        if workers:
            self._pool = KillablePool("r1jax.rewards.pool:item_grader", given, workers, timeout_s)

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(self, ticket: int, prompt: str, completion: str, example: Mapping[str, Any]) -> None:
        """Queues one completion; `ticket` names it in its Graded and must differ from those not yet returned."""
        item = (prompt, completion, example)
        if self._pool:
            self._pool.submit(ticket, item)
            return
        start_s = time.perf_counter()
        value = self._grade(item)
        self._inline.append(Outcome(ticket, value, "", time.perf_counter() - start_s))

    def poll(self) -> list[Graded]:
        """What has been graded since the last call, in the order of tickets; does not wait."""
        return list(map(self._graded, self._pool.poll() if self._pool else self._take_inline()))

    def drain(self) -> list[Graded]:
        """Waits until everything submitted is graded or lost, then as `poll`."""
        return list(map(self._graded, self._pool.drain(self._batch_timeout_s) if self._pool else self._take_inline()))

    def close(self) -> None:
        """Kills the processes; what is not graded yet is forgotten."""
        if self._pool:
            self._pool.close()

    def _take_inline(self) -> list[Outcome]:
        outcomes, self._inline = sorted(self._inline, key=lambda outcome: outcome.ticket), []
        return outcomes

    def _graded(self, outcome: Outcome) -> Graded:
        if outcome.fate:
            self._log_once(outcome.fate, f"completion {outcome.ticket}, after {outcome.seconds:.1f} s")
            nothing = dict.fromkeys(self._weights, 0.0)
            return Graded(outcome.ticket, nothing, 0.0, None, (outcome.fate,), outcome.seconds)
        rewards, answer, flags, tracebacks = outcome.value
        for flag, text in tracebacks.items():
            self._log_once(flag, text)
        total = sum(weight * rewards[name] for name, weight in self._weights.items())
        return Graded(outcome.ticket, rewards, total, answer, tuple(flags), outcome.seconds)

    def _log_once(self, flag: str, text: str) -> None:
        if flag not in self._logged:
            self._logged.add(flag)
            log.warning("grading: first %s (counted from now on, not logged): %s", flag, text)
