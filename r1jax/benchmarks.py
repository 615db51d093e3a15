"""The benchmarks of the R1 report as a table: which columns a record has, how it is asked and how it is graded.

R1 report (arXiv 2501.12948), section 3: samples per problem are its own where it names them, else our choice. Columns
are those of the published files; where several layouts are in use each is accepted, the first one found is taken.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from r1jax import records_of, sources
from r1jax.types import Example

BOXED = "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
BOXED_ZH = "{question}\n\n请逐步推理，并把最终答案放在 \\boxed{{}} 中。"
PROGRAM = "{question}\n\nWrite the complete Python program in one ```python block."
CHOICE = (
    "Answer the following multiple choice question. The last line of your response must be 'Answer: X', where X is one "
    "of the letters. Think step by step before answering.\n\n{question}"
)
CHOICE_ZH = "以下是一道单项选择题。请逐步推理，最后一行写“答案：X”，X 是选项的字母。\n\n{question}"
SPAN = "{question}\n\nThink step by step, then put the answer alone within \\boxed{{}}."

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One kind of benchmark.

    Attributes:
        columns: alternatives; a record has to have all columns of one of them.
        read: of a record, its question, its answer and whatever else its grader reads; None: not a problem of the test.
        prompt: with a place for the question.
        grader: of rewards.table.GRADERS.
        samples: per problem.
        rewards: by name; the first one is what the benchmark is about.
        has_votes: whether a majority vote means something.
        split: of a TensorFlow dataset.
    """

    columns: tuple[tuple[str, ...], ...]
    read: Callable[[Record], dict[str, Any] | None]
    prompt: str
    grader: str
    samples: int = 4
    rewards: tuple[str, ...] = ("accuracy",)
    has_votes: bool = True
    split: str = "test"


_MATH = Benchmark(records_of.PROBLEMS, records_of.problem, BOXED, "math")
_CHOICE = Benchmark(records_of.CHOICES, records_of.choice, CHOICE, "choice")
_JUDGED = Benchmark(
    records_of.REPLIES, records_of.reply, "{question}", "judged", samples=1, rewards=("accuracy",), has_votes=False
)
_CODE = dataclasses.replace(
    _MATH, columns=records_of.HUMANEVAL, read=records_of.humaneval, prompt=PROGRAM, grader="code", has_votes=False
)

TABLE: dict[str, Benchmark] = {
    "math500": dataclasses.replace(_MATH, samples=16),  # reported
    "math": _MATH,
    "aime24": dataclasses.replace(_MATH, samples=64),  # reported
    "aime25": dataclasses.replace(_MATH, samples=64),
    "cnmo24": dataclasses.replace(_MATH, prompt=BOXED_ZH, samples=64),
    "gsm8k": _MATH,
    "svamp": _MATH,
    "cmath": dataclasses.replace(_MATH, prompt=BOXED_ZH),
    "humaneval": _CODE,
    "mbpp": dataclasses.replace(_CODE, columns=records_of.MBPP, read=records_of.mbpp),
    "livecodebench": dataclasses.replace(  # samples: reported
        _CODE, columns=records_of.LIVECODEBENCH, read=records_of.livecodebench, samples=8
    ),
    "mmlu": _CHOICE,
    "mmlu_redux": _CHOICE,
    "mmlu_pro": _CHOICE,
    "gpqa": dataclasses.replace(_CHOICE, samples=64),  # reported
    "ceval": dataclasses.replace(_CHOICE, prompt=CHOICE_ZH, split="validation"),
    "drop": Benchmark(records_of.PASSAGES, records_of.passage, SPAN, "exact", rewards=("f1", "accuracy")),
    "ifeval": Benchmark(
        records_of.INSTRUCTIONS,
        records_of.instructions,
        "{question}",
        "instructions",
        rewards=("accuracy", "instructions_share"),
        has_votes=False,
    ),
    "alpaca_eval": _JUDGED,
    "arena_hard": _JUDGED,
}


@dataclasses.dataclass(frozen=True)
class Named:
    """A benchmark as config.eval.benchmarks names it: an entry of TABLE and where its records are."""

    name: str
    source: str
    kind: Benchmark


def parse(entry: str) -> Named:
    """NAME=PATH.jsonl, NAME=PATH.jsonl.gz or NAME=tfds:DATASET.

    Raises:
        ValueError: another form, or no such benchmark.
    """
    name, equals, source = entry.partition("=")
    if not equals or not source:
        raise ValueError(
            f"config.eval.benchmarks has {entry!r}, wanted NAME=PATH.jsonl or NAME=tfds:DATASET, NAME one of "
            f"{', '.join(TABLE)}"
        )
    if name not in TABLE:
        near = difflib.get_close_matches(name, TABLE, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"config.eval.benchmarks names {name!r}, wanted one of {', '.join(TABLE)}{hint}")
    return Named(name, source, TABLE[name])


def read(named: Named) -> list[Example]:
    """The problems of a benchmark; `asked` is the bare question, `question` what the policy is shown.

    Raises:
        ValueError: a missing file; a record with other columns or with nothing to grade by, named with file and line.
    """
    kind = named.kind
    examples, seen = [], {}
    for where, record in _records(named):
        if not any(record.keys() >= set(layout) for layout in kind.columns):
            wanted = " or ".join(", ".join(layout) for layout in kind.columns)
            raise ValueError(f"{where}: {named.name} wants the columns {wanted}; there are {', '.join(record)}")
        try:
            fields = kind.read(record)
        except (ValueError, KeyError, TypeError, LookupError) as error:
            raise ValueError(f"{where}: no problem of {named.name}: {error!r:.200}") from error
        if fields is None:
            continue
        if not isinstance(fields["question"], str) or not fields["question"].strip():
            raise ValueError(f"{where}: the question is {fields['question']!r:.80}, wanted a text")
        if fields["answer"] in (None, "", [], {}):
            raise ValueError(f"{where}: there is no answer")
        name = next((record[key] for key in ("id", "task_id", "question_id", "ID", "key", "uid") if key in record), "")
        example = {
            "level": record["level"] if isinstance(record.get("level"), int) else None,
            **fields,
            "id": f"{named.name}/{name if name != '' else len(examples)}",
            "grader": kind.grader,
            "asked": fields["question"],
            "question": kind.prompt.format(question=fields["question"]),
        }
        if example["id"] in seen:  # published files repeat ids between subjects
            example["id"] += f"#{len(examples)}"
        seen[example["id"]] = where
        examples.append({key: value for key, value in example.items() if value is not None})
    if not examples:
        raise ValueError(f"config.eval.benchmarks: {named.source} has no problem of {named.name}")
    return examples


def _records(named: Named) -> list[tuple[str, Record]]:
    if named.source.endswith((".jsonl", ".jsonl.gz")):
        read = sources.read_records(named.source, f"config.eval.benchmarks ({named.name})")
        return [(f"{named.source}, line {number}", record) for number, record in read]
    kind, _, dataset = named.source.partition(":")
    if kind == "tfds" and dataset:
        return sources.tfds_records(dataset, named.kind.split)
    raise ValueError(
        f"config.eval.benchmarks: the source of {named.name} is {named.source!r}, wanted PATH.jsonl, PATH.jsonl.gz or "
        "tfds:DATASET"
    )
