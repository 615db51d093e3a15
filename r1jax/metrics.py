"""What a run tells: metrics under standard names, rollouts, the summary, and the progress on the screen.

All files belong to the run folder. Of several hosts only the writer writes, so that a folder does not show how many
there were. The names follow TRL's and verl's custom of `topic/quantity`.
"""

import contextlib
import json
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TextIO

import numpy as np

from r1jax import hosts

# Every name that may be logged. <...> stands for a name from the config or the code; shares lie in 0..1.
NAMES = {
    "loss/mean": "the loss that was minimised",
    "loss/policy": "its policy-gradient part",
    "loss/<part>": "another part: next_token, mtp, kl, value",
    "accuracy/<part>": "share of predictions that are right: next_token, mtp, preference",
    "reward/mean": "weighted sum of the rewards, mean over completions",
    "reward/std": "its standard deviation over completions",
    "reward/<name>/mean": "one reward, unweighted",
    "reward/<name>/std": "its standard deviation over completions",
    "grading/<flag>_share": "completions that got a zero because grading went wrong: timeout, error, nan, died",
    "group/majority_share": "groups whose commonest answer is right",
    "group/zero_variance_share": "groups of equal rewards, which teach nothing",
    "group/resampled": "groups drawn again by dynamic sampling",
    "kl/mean": "estimated KL of the policy to the reference, per token",
    "clip/low_share": "tokens whose ratio was clipped from below",
    "clip/high_share": "tokens whose ratio was clipped from above",
    "ratio/mean": "probability under the policy over that under the old policy, per token",
    "ratio/max": "the largest such ratio",
    "entropy/mean": "entropy of the policy's next-token distribution, nats per token",
    "length/mean": "completion length, tokens",
    "length/max": "the longest completion, tokens",
    "length/right": "mean length of completions that are right, tokens",
    "length/wrong": "mean length of those that are not",
    "length/limit": "the limit in force, tokens",
    "length/truncated_share": "completions cut off by the limit",
    "mismatch/mean_abs": "|log-probability by trainer - by sampler|, mean over sampled tokens",
    "mismatch/max": "the largest such difference",
    "mismatch/kl": "estimated KL of the sampler's distribution to the trainer's, per token",
    "importance/truncated_share": "tokens whose importance weight was truncated",
    "reflective/per_completion": "reflective words (text.REFLECTIVE_WORDS) per completion",
    "reflective/<word>": "one of these words per completion",
    "grad/norm": "global norm of the gradient before clipping",
    "grad/skipped": "steps skipped so far because something was not finite",
    "param/norm": "global norm of the policy",
    "value/explained_share": "share of the returns' variance that a value model explains; 0 for their mean",
    "optim/lr": "learning rate of this step",
    "expert/load_max": "tokens of the busiest expert over the mean, largest over layers",
    "expert/bias_max": "largest absolute router bias",
    "pack/fill_share": "positions of the packed batch that hold tokens",
    "data/epoch": "how often the prompts have been gone through",
    "compute/flops": "operations that this step asked for (r1jax.flops), sampling and scoring included",
    "throughput/rollout_tokens_per_s": "sampled tokens per second of rollout",
    "throughput/train_tokens_per_s": "prompt and completion tokens per second of update",
    "throughput/slots_busy_share": "slot-steps of the sampler that produced a token",
    "time/<move>_s": "wall time of one move of the step",
    "memory/peak_rss_gb": "peak memory of the writer's processes so far",
    "eval/<measure>": "a field of the summary's evals",
}
_KNOWN = re.compile("|".join(re.sub("<[^>]*>", "[^/]+", name) for name in NAMES))

Scalars = Mapping[str, float]
Json = Mapping[str, Any]


def to_json(value: Any) -> str:
    """JSON in one line for what metrics and rollouts hold: NaN and infinities as null, arrays rounded to 5 decimals."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        value = (value.astype(float).round(5) if value.dtype.kind in "fV" else value).tolist()  # V: bfloat16
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Log:
    """Appends one record per step to metrics.jsonl and to TensorBoard (one of its runs per stage)."""

    def __init__(self, workdir: str | os.PathLike[str], stage: str, resume_step: int | None = None) -> None:
        """Drops what `stage` logged beyond `resume_step`, as the resumed run logs it again; None drops all of it.

        Raises:
            ValueError: metrics.jsonl holds a line that is not JSON, other than a last one that was cut off.
        """
        self.stage = stage
        self._file, self._board = None, None
        if not hosts.is_writer():
            return
        path = pathlib.Path(workdir) / "metrics.jsonl"
        hosts.atomic_write(path, "".join(_kept_lines(path, stage, -1 if resume_step is None else resume_step)))
        self._file = path.open("a", encoding="utf-8")
        first_step = 0 if resume_step is None else resume_step + 1
        self._board = _Board(pathlib.Path(workdir) / "metrics" / stage, first_step)

    def write(self, step: int, scalars: Scalars) -> None:
        """Logs a step, counted from 1; both files are up to date when this returns."""
        for name in scalars:
            assert _KNOWN.fullmatch(name), f"{name} is not in metrics.NAMES"
        if self._file:
            self._file.write(to_json({"stage": self.stage, "step": step, **scalars}) + "\n")
            self._file.flush()
            self._board.write(step, scalars)

    def close(self) -> None:
        """Closes both files."""
        if self._file:
            self._file.close()
            self._board.close()


class _Board:
    """A TensorBoard event file written at once: tensorboardX's SummaryWriter has a queue, which a kill loses."""

    def __init__(self, folder: pathlib.Path, first_step: int) -> None:
        # tensorboardX imports torch wherever it finds it: seconds and hundreds of megabytes that nothing here uses.
        hide = "torch" not in sys.modules
        if hide:
            sys.modules["torch"] = None
        try:
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2, summary_pb2
        finally:
            if hide:
                del sys.modules["torch"]
        self._event, self._scalars = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        # The suffix tells apart the files of one second.
        self._file = EventsWriter(str(folder / "events"), f".from{first_step}")
        # From here on TensorBoard ignores what earlier files hold of this step and later ones.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._file.write_event(event_pb2.Event(wall_time=time.time(), step=first_step, session_log=start))

    def write(self, step: int, scalars: Scalars) -> None:
        values = [{"tag": name, "simple_value": value} for name, value in scalars.items() if math.isfinite(value)]
        self._file.write_event(self._event(wall_time=time.time(), step=step, summary=self._scalars(value=values)))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _kept_lines(path: pathlib.Path, stage: str, last_step: int) -> Iterator[str]:
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            return  # the run was killed while it wrote this
        try:
            record = json.loads(line)
            kept = record["stage"] != stage or record["step"] <= last_step
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is no record of a step ({error}); repair or delete the line"
            ) from error
        if kept:
            yield line.decode()


def write_rollout(workdir: str | os.PathLike[str], stage: str, rollout: int, rows: Iterable[Json]) -> None:
    """Writes rollouts/STAGE-ROLLOUT.jsonl whole, one row per completion; a repeated rollout replaces its file.

    A row holds at least stage, step, rollout, prompt_id, member, prompt, completion and reward; see `run_folder`.
    """
    if hosts.is_writer():
        path = pathlib.Path(workdir) / "rollouts" / f"{stage}-{rollout:06d}.jsonl"
        hosts.atomic_write(path, "".join(to_json(row) + "\n" for row in rows))


class Summary:
    """summary.json: wall_s (over all continuations of the run), peak_rss_gb and two lists of evaluations.

    Attributes:
        evals: on held-out problems, the base's first.
        validation: on problems that decisions are taken by.
    """

    def __init__(self, workdir: str | os.PathLike[str], started_s: float) -> None:
        """Goes on from the summary that is there.

        Args:
            workdir: the run folder.
            started_s: `time.monotonic()` when this process began.

        Raises:
            ValueError: the summary that is there is not one.
        """
        self.path = pathlib.Path(workdir) / "summary.json"
        self._started_s = started_s
        self._wall_s, self._peak_rss_gb = 0.0, 0.0
        self.evals: list[Json] = []
        self.validation: list[Json] = []
        # What hosts saw differently, they would do differently.
        if hosts.agree(self.path.exists()):
            try:
                before = json.loads(self.path.read_bytes())
                self._wall_s, self._peak_rss_gb = float(before["wall_s"]), float(before["peak_rss_gb"])
                self.evals, self.validation = (
                    [{**one, "stage": one["stage"], "step": one["step"]} for one in listed]
                    for listed in (before["evals"], before.get("validation", []))
                )
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path} is no run's summary ({error!r}); delete it to go on without") from error

    def has(self, how: Json) -> bool:
        """Whether evals hold an evaluation of this stage, step and benchmark that agrees with `how` in all it names.

        One that does not, but was measured in another way, is named: it will be replaced.
        """
        one = next((one for one in self.evals if _is_same(one, how)), None)
        if one is None:
            return False
        others = [f"{key} is {value!r}, was {one.get(key)!r}" for key, value in how.items() if one.get(key) != value]
        if others:
            what = " ".join([how["stage"], *filter(None, [how.get("benchmark")])])
            hosts.say(f"{what}, step {how['step']} is measured anew: {', '.join(others)}")
        return not others

    def add(self, result: Json, to: list[Json] | None = None) -> None:
        """Adds an evaluation to evals or another list, in place of one of the same stage, step and benchmark."""
        to = self.evals if to is None else to
        for i, one in enumerate(to):
            if _is_same(one, result):
                to[i] = dict(result)
                break
        else:
            to.append(dict(result))
        self.write()

    def write(self) -> None:
        """Writes the file with the time and memory used so far."""
        if hosts.is_writer():
            record = {
                "wall_s": round(self._wall_s + time.monotonic() - self._started_s, 3),
                "peak_rss_gb": round(max(self._peak_rss_gb, hosts.peak_rss_gb()), 3),
                "evals": _plain(self.evals),
                **({"validation": _plain(self.validation)} if self.validation else {}),
            }
            hosts.atomic_write(self.path, json.dumps(record, ensure_ascii=False, indent=1) + "\n")


def _is_same(one: Json, other: Json) -> bool:
    return all(one.get(key) == other.get(key) for key in ("stage", "step", "benchmark"))


class Moves:
    """A stopwatch for the moves of a step: `with moves("rollout"): ...`. Device work counts where it is waited for."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, move: str) -> Iterator[None]:
        """Adds the time spent inside to the move's."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[move] = self._seconds.get(move, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """time/<move>_s of all moves since the last call, then forgets them."""
        seconds, self._seconds = self._seconds, {}
        return {f"time/{move}_s": s for move, s in seconds.items()}


# What the display shows of a step, where it was measured.
COLUMNS = (
    ("loss", "loss/mean", "{:7.4f}"),
    ("reward", "reward/mean", "{:6.3f}"),
    ("pass", "reward/accuracy/mean", "{:6.1%}"),
    ("length", "length/mean", "{:6.1f}"),
    ("tokens/s", "throughput/rollout_tokens_per_s", "{:7,.0f}"),
    ("tokens/s", "throughput/train_tokens_per_s", "{:7,.0f}"),
)


class Progress:
    """How a stage is getting on: one live line on a terminal, one plain line per step in a log file."""

    def __init__(self, stage: str, n_steps: int, done: int = 0, out: TextIO | None = None) -> None:
        """`done` of the stage's `n_steps` steps lie before this process; `out` is standard output if not given."""
        self._stage, self._n_steps = stage, n_steps
        self._out = out or sys.stdout
        self._quiet = not hosts.is_writer()
        self._times: list[tuple[float, int]] = []
        self._live = None
        if self._quiet:
            return
        if hasattr(self._out, "reconfigure"):
            self._out.reconfigure(errors="replace")  # a character that the log cannot hold must not end the run
        if self._out.isatty():
            from rich import console, live, progress

            tail = (progress.TextColumn("{task.fields[pace]}"), progress.TimeElapsedColumn())
            self._bar = progress.Progress(
                "{task.description}", progress.BarColumn(), progress.MofNCompleteColumn(), *tail
            )
            self._task = self._bar.add_task(stage, total=n_steps, completed=done, pace="")
            self._live = live.Live(self._bar, console=console.Console(file=self._out), refresh_per_second=2)
            self._live.start()
            self._group = console.Group

    def step(self, step: int, scalars: Scalars) -> None:
        """Shows that a step is done, with whatever COLUMNS name of its metrics."""
        shown = "  ".join(f"{label} {form.format(scalars[key])}" for label, key, form in COLUMNS if key in scalars)
        pace = self._pace(step)
        if self._live:
            self._bar.update(self._task, completed=step, pace=pace)
            self._live.update(self._group(self._bar, shown))
        else:
            self.say(f"{self._stage} {step:{len(str(self._n_steps))}}/{self._n_steps}  {shown}  {pace}".rstrip())

    def _pace(self, step: int) -> str:
        # Of the last 20 steps, as they grow with the completions; the first one compiles and does not count.
        self._times = [*self._times[-20:], (time.monotonic(), step)]
        (start_s, start), (now_s, _) = self._times[0], self._times[-1]
        if step == start:
            return ""
        step_s = (now_s - start_s) / (step - start)
        left_s = round(step_s * (self._n_steps - step))
        return f"{step_s:5.2f} s/step  {left_s // 3600}:{left_s // 60 % 60:02}:{left_s % 60:02} left"

    def sample(self, step: int, prompt: str, completion: str, reward: float) -> None:
        """Shows one completion; of a long text the beginning and the end."""
        text = f"step {step}, a completion with reward {reward:.3f}\nprompt: {prompt}\ncompletion: {completion}"
        self.say("\n".join(("  | " if i else "") + line for i, line in enumerate(_printable(text).split("\n"))))

    def say(self, text: str) -> None:
        """Prints a message without disturbing the live line."""
        if self._live:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif not self._quiet:
            print(text, file=self._out, flush=True)

    def close(self) -> None:
        """Leaves the last state of the live line on the screen."""
        if self._live:
            self._live.stop()


@contextlib.contextmanager
def reading(what: str, out: TextIO | None = None, patience_s: float = 2.0) -> Iterator[Callable[[int, int], None]]:
    """How much of `what` is read: a bar on a terminal, a line every ten seconds in a log file, nothing if it is quick.

    Yields what to call with the bytes read so far and the bytes there are.
    """
    out, start_s = out or sys.stdout, time.monotonic()
    bar, said_s = None, start_s + patience_s - 10

    def show(done: int, total: int) -> None:
        nonlocal bar, said_s
        now_s = time.monotonic()
        if not hosts.is_writer() or now_s - start_s < patience_s:
            return
        if out.isatty():
            from rich import console, progress

            if bar is None:
                columns = (progress.BarColumn(), progress.DownloadColumn(), progress.TransferSpeedColumn())
                bar = progress.Progress("{task.description}", *columns, console=console.Console(file=out))
                bar.add_task(what, total=total)
                bar.start()
            bar.update(bar.task_ids[0], completed=done)
        elif now_s - said_s >= 10:
            said_s, speed = now_s, done / 1e9 / (now_s - start_s)
            print(f"{what}: {done / 1e9:.1f} of {total / 1e9:.1f} GB, {speed:.2f} GB/s", file=out, flush=True)

    try:
        yield show
    finally:
        if bar is not None:
            bar.stop()


def _printable(text: str, head: int = 1500, tail: int = 500) -> str:
    if len(text) > head + tail:
        text = f"{text[:head]} [... {len(text) - head - tail:,} characters ...] {text[-tail:]}"
    # Control characters that a policy makes up must not reach the terminal.
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
