"""What a run left in its folder, read for people: the report page, the README's picture.

A run may have been killed at any moment, so every file may be missing or end in half a line: whatever is readable is
returned, and each gap is named in `notes`. The records are those of DESIGN section 4.
"""

import collections
import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

Record = dict[str, Any]

MAX_COMPLETIONS = 4_000
MAX_COMPLETION_BYTES = 3_000_000
# A 32,768-token completion is 400 kB on the page; its beginning and its end are what people read.
HEAD_TOKENS, TAIL_TOKENS = 1_000, 500


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run's records.

    metrics: per stage (in order of appearance) one record per optimizer step, steps ascending.
    completions: see `sample_completions`.
    reward_models: of each its stage, its name and what was measured of it on held-out rows.
    notes: sentences on what is missing, unreadable or left out.
    """

    name: str
    config: Record
    summary: Record
    metrics: dict[str, list[Record]]
    completions: Record
    reward_models: list[Record]
    notes: list[str]

    @property
    def evals(self) -> list[Record]:
        """The evaluations on held-out problems in the order they were made, the base's first."""
        return [e for e in self._evals if "benchmark" not in e]

    @property
    def benchmarks(self) -> list[Record]:
        """Those on benchmarks: their numbers are no curve of one thing."""
        return [e for e in self._evals if "benchmark" in e]

    @property
    def validation(self) -> list[Record]:
        """Those on problems that decisions are taken by: the alarm for reward hacking."""
        return self._listed("validation")

    @property
    def _evals(self) -> list[Record]:
        return self._listed("evals")

    def _listed(self, name: str) -> list[Record]:
        found = self.summary.get(name)
        return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []

    def training_flops(self, stage: str, last_step: float = math.inf) -> float:
        """Operations that a stage asked for up to a step, 0 where nothing says it."""
        records = (r for r in self.metrics.get(stage, []) if r["step"] <= last_step)
        return sum(number(record.get("compute/flops")) or 0.0 for record in records)


def number(value: Any) -> float | None:
    """`value` if it is a finite number, else None (JSON has no NaN, and browsers refuse a page that holds one)."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def read_run(workdir: str | pathlib.Path, with_completions: bool = True) -> RunFolder:
    """Reads the run folder `workdir`; ValueError when it is no such folder."""
    folder = pathlib.Path(workdir)
    files = ("config.json", "summary.json", "metrics.jsonl", "rollouts")
    if not any((folder / name).exists() for name in files):
        raise ValueError(f"--workdir={workdir}: wanted a run folder, which holds any of {', '.join(files)}")
    notes: list[str] = []
    metrics = _read_metrics(folder / "metrics.jsonl", notes)
    return RunFolder(
        name=folder.resolve().name,
        config=_read_object(folder / "config.json", notes),
        summary=_read_object(folder / "summary.json", notes),
        metrics=metrics,
        completions=sample_completions(folder / "rollouts", notes, list(metrics)) if with_completions else {},
        reward_models=[
            {"stage": path.parent.parent.name, "model": path.parent.name, **_read_object(path, notes)}
            for path in sorted(folder.glob("models/[!.]*/*/report.json"))
        ],
        notes=notes,
    )


def _parse(text: bytes) -> Record:
    """One JSON object; ValueError when it is anything else."""
    try:
        record = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is wanted, not {type(record).__name__}")
    return record


def _read_object(path: pathlib.Path, notes: list[str]) -> Record:
    try:
        return _parse(path.read_bytes())
    except FileNotFoundError:
        notes.append(f"{path.name} is missing" + (": the run has not ended" if path.stem == "summary" else ""))
    except ValueError as error:
        notes.append(f"{path.name} is not readable: {error}")
    return {}


def _read_lines(path: pathlib.Path, notes: list[str]) -> Iterator[tuple[int, int, Record]]:
    """Yields (offset, length in bytes, record) of each readable line; the others are counted in `notes`."""
    bad: list[int] = []
    offset = 0
    with path.open("rb") as lines:
        for number_of_line, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield offset, len(line), _parse(line)
                except ValueError:
                    bad.append(number_of_line)
            offset += len(line)
    if bad:
        more = f" and {len(bad) - 1} more lines are" if len(bad) > 1 else " is"
        notes.append(f"{path.name}: line {bad[0]}{more} not a JSON object (cut off?) and left out")


def _read_metrics(path: pathlib.Path, notes: list[str]) -> dict[str, list[Record]]:
    if not path.exists():
        notes.append("metrics.jsonl is missing: no curves")
        return {}
    stages: dict[str, dict[int, Record]] = {}
    for _, _, record in _read_lines(path, notes):
        step = number(record.get("step"))
        if step is not None:
            # A run that was killed repeats the steps since its last checkpoint: the later line counts.
            steps = stages.setdefault(str(record.get("stage", "")), {})
            steps[int(step)] = record
    return {stage: [steps[step] for step in sorted(steps)] for stage, steps in stages.items()}


def spread(n: int) -> list[int]:
    """0..n-1 in an order whose every prefix lies evenly over the range, both ends first (van der Corput, 1935)."""
    bits = max(n - 1, 1).bit_length()
    order = sorted(range(n), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))
    return list(dict.fromkeys([*order[:1], *([n - 1] if n else []), *order]))


def sample_completions(
    folder: pathlib.Path,
    notes: list[str],
    stages: Sequence[str] = (),
    max_completions: int = MAX_COMPLETIONS,
    max_bytes: int = MAX_COMPLETION_BYTES,
) -> Record:
    """Whole groups from `folder`/**/*.jsonl, evenly over the rollouts, until one of the two limits is reached.

    Within a rollout those prompts come first that other rollouts hold too, as they can be compared across steps.
    The rollouts of `stages` come in that order, others after them.
    Returns {"prompts": [{id, text, label, level, gold}], "rollouts": [{stage, step, rollout}], "completions": [{at,
    prompt, member, tokens, logp, ...}]}; `at` is a rollout's index, `prompt` a prompt's. `notes` gets what is left out.
    """
    # Two passes: a long run's rollouts do not fit in memory, their places in the files do.
    places = _index(folder, notes, stages)
    held_by = collections.Counter(prompt_id for groups in places.values() for prompt_id in groups)
    ranked = [sorted(groups, key=lambda prompt_id: (-held_by[prompt_id], prompt_id)) for groups in places.values()]
    ranks = range(max(map(len, ranked), default=0))
    queue = [(at, ranked[at][rank]) for rank in ranks for at in spread(len(ranked)) if rank < len(ranked[at])]

    rollouts = list(places)
    prompts: dict[str, Record] = {}
    completions: list[Record] = []
    n_bytes = 0
    for at, prompt_id in queue:
        lines = [_read_place(place) for _, place in sorted(places[rollouts[at]][prompt_id].items())]
        group = [{"at": at, "prompt": prompt_id, **_compact(line)} for line in lines]
        new = {} if prompt_id in prompts else {prompt_id: _prompt(prompt_id, lines[0])}
        n_bytes += len(json.dumps([group, new]))
        if completions and (len(completions) + len(group) > max_completions or n_bytes > max_bytes):
            break
        prompts |= new
        completions += group
    number_of = {prompt_id: i for i, prompt_id in enumerate(prompts)}
    for completion in completions:
        completion["prompt"] = number_of[completion["prompt"]]
    for prompt, label in zip(prompts.values(), prompt_labels([p["text"] for p in prompts.values()]), strict=True):
        prompt["label"] = label

    total = sum(len(group) for groups in places.values() for group in groups.values())
    if not total:
        notes.append("rollouts holds no completions to browse")
    if len(completions) < total:
        shown = f"{len(completions):,} of the {total:,} recorded completions"
        notes.append(f"{shown} are on this page: whole groups, evenly over the steps")
    if any("cut" in completion for completion in completions):
        notes.append(f"of longer completions the first {HEAD_TOKENS:,} and last {TAIL_TOKENS:,} tokens are shown")
    return {
        "prompts": list(prompts.values()),
        "rollouts": [{"stage": stage, "step": step, "rollout": rollout} for stage, step, rollout in rollouts],
        "completions": completions,
    }


class _Place(NamedTuple):
    path: pathlib.Path
    offset: int
    length: int


# (stage, step, rollout) -> prompt_id -> member -> place
_Places = dict[tuple[str, int, int], dict[str, dict[int, _Place]]]


def _index(folder: pathlib.Path, notes: list[str], stages: Sequence[str]) -> _Places:
    places: _Places = {}
    incomplete = 0
    for path in sorted(folder.rglob("*.jsonl")):
        for offset, length, line in _read_lines(path, notes):
            rollout, member = number(line.get("rollout")), number(line.get("member"))
            if None in (rollout, member) or "prompt_id" not in line or not isinstance(line.get("completion"), str):
                incomplete += 1
                continue
            at = (str(line.get("stage", "")), int(number(line.get("step")) or 0), int(rollout))
            places.setdefault(at, {}).setdefault(str(line["prompt_id"]), {})[int(member)] = _Place(path, offset, length)
    if incomplete:
        notes.append(f"rollouts: {incomplete} lines lack rollout, prompt_id, member or completion and were left out")
    order = list(dict.fromkeys([*stages, *(stage for stage, _, _ in places)]))
    return {at: places[at] for at in sorted(places, key=lambda at: (order.index(at[0]), *at[1:]))}


def _read_place(place: _Place) -> Record:
    with place.path.open("rb") as lines:
        lines.seek(place.offset)
        return _parse(lines.read(place.length))


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _prompt(prompt_id: str, line: Record) -> Record:
    return {
        "id": prompt_id,
        "text": str(line.get("prompt", "")),
        "level": _text(line.get("level")),
        "gold": _text(line.get("gold")),
    }


def prompt_labels(texts: list[str]) -> list[str]:
    """The prompts without the template around them: what all begin and end with tells none of them apart."""
    if len(texts) < 2:
        return [_shortened(text) for text in texts]
    head, tail = _common_head(texts), _common_head([text[::-1] for text in texts])[::-1]
    # A question may begin or end like all the others: the template is cut at the end of a sentence.
    start = max(head.rfind(mark) + len(mark) if mark in head else 0 for mark in (". ", ": ", "\n"))
    kept = min(tail.find(mark) if mark in tail else len(tail) for mark in (". ", "\n"))
    return [_shortened(text[start : len(text) - len(tail) + kept].strip() or text) for text in texts]


def _common_head(texts: list[str]) -> str:
    first, last = min(texts), max(texts)
    end = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:end]


def _shortened(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:60]} … {text[-35:]}"


def _compact(line: Record) -> Record:
    """The fields of one completion that the page shows; log-probabilities in hundredths of a nat."""
    completion, tokens = line["completion"], line.get("tokens")
    if not (isinstance(tokens, list) and tokens and all(isinstance(token, str) for token in tokens)):
        tokens = re.findall(r"\s*\S+|\s+$", completion)
    logp = line.get("logp") if isinstance(line.get("logp"), list) else []
    logp = [None if (value := number(entry)) is None else round(100 * value) for entry in logp[: len(tokens)]]
    rewards = line.get("rewards") if isinstance(line.get("rewards"), dict) else {}
    flags = line.get("flags") if isinstance(line.get("flags"), list) else []
    fields = {
        "member": int(line["member"]),
        "length": len(tokens),
        "rewards": {name: number(value) for name, value in rewards.items()},
        "reward": number(line.get("reward")),
        "advantage": number(line.get("advantage")),
        "answer": _text(line.get("answer")),
        "stop": _text(line.get("stop")),
        "flags": [str(flag) for flag in flags],
    }
    n_cut = len(tokens) - HEAD_TOKENS - TAIL_TOKENS
    if n_cut > 0:
        fields["cut"] = {"at": HEAD_TOKENS, "tokens": n_cut}
        tokens, logp = ([*part[:HEAD_TOKENS], *part[HEAD_TOKENS + n_cut :]] for part in (tokens, logp))
    return {**fields, "tokens": tokens, "logp": logp}
