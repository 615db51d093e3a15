"""Whether problems stand in training data: ten words in a row that are in both.

The R1 report leaves out training text with a 10-gram of an evaluation question (arXiv 2501.12948, section on
decontamination); here it is reported which problems are concerned, and training prompts can be left out.
"""

import collections
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from r1jax import data, sources
from r1jax.types import Example

N = 10
# A Chinese, Japanese or Korean character is a word: no spaces divide them.
CJK = "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]"
_WORD = re.compile(rf"{CJK}|(?:(?!{CJK})[^\W_])+")


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation; each CJK character is one."""
    return _WORD.findall(text.casefold())


def runs_of(text: str, n: int = N) -> set[tuple[str, ...]]:
    """Every n words in a row; all words of a text that has fewer."""
    found = words(text)
    return {tuple(found[i : i + n]) for i in range(max(len(found) - n, 0) + 1)} if found else set()


def overlapping(questions: Sequence[str], texts: Iterable[str], n: int = N) -> list[int]:
    """Which questions have n words in a row with one of the texts, by their place.

    A question of fewer words does where all of them stand in a row in a text.
    """
    owners: dict[tuple[str, ...], set[int]] = collections.defaultdict(set)
    for i, question in enumerate(questions):
        for run in runs_of(question, n):
            owners[run].add(i)
    lengths = sorted({len(run) for run in owners})
    found: set[int] = set()
    for text in texts:
        said = words(text)
        for length in lengths:
            for start in range(len(said) - length + 1):
                if (run := tuple(said[start : start + length])) in owners:
                    found |= owners[run]
    return sorted(found)


def texts_of(spec: str, key: str, split: str = "rl") -> Iterator[str]:
    """Every text of a JSON Lines file (chats, prompts, whatever their columns), or the questions of a data source.

    Raises:
        ValueError: no such file or source.
    """
    if spec.endswith((".jsonl", ".jsonl.gz")):
        for _, record in sources.read_records(spec, key):
            yield from _strings(record)
        return
    try:
        examples = data.open_source(spec, split, sources.Columns()).examples
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    yield from (example["question"] for example in examples)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)


def asked(example: Example) -> str:
    """What is particular to a problem: of a benchmark the question without the instruction around it."""
    return example.get("asked", example["question"])


def report(examples: Sequence[Example], against: Sequence[str], split: str = "rl") -> dict[str, Any]:
    """Which problems overlap with training data: {against, n, overlapping, share, ids}."""
    texts = (text for spec in against for text in texts_of(spec, "config.eval.decontaminate", split))
    ids = [examples[i]["id"] for i in overlapping([asked(one) for one in examples], texts)]
    return {
        "against": list(against),
        "n": N,
        "overlapping": len(ids),
        "share": len(ids) / len(examples),
        "ids": ids,
    }


def without(examples: Sequence[Example], problems: Sequence[str], split: str) -> tuple[list[Example], list[Example]]:
    """Training prompts that are clear of these problems (files or sources), and those that are not.

    Here the problems' runs are looked for in the prompts, so that a prompt of few words is not lost to a long text.
    """
    runs = {
        run for spec in problems for text in texts_of(spec, "config.data.decontaminate", split) for run in runs_of(text)
    }
    clean, dropped = [], []
    for example in examples:
        (dropped if runs & runs_of(asked(example)) else clean).append(example)
    return clean, dropped
