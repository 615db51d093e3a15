"""Readers of prompts: JSON Lines, TensorFlow Datasets without TensorFlow, reasoning-gym (arXiv 2505.24760).

Each gives a list of examples in a fixed order: dicts with `id`, `question`, `answer`, `grader`, perhaps `level`, and
whatever other columns the data has.
"""

import dataclasses
import difflib
import gzip
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from r1jax.types import Example

# GSM8K's convention, which others took over: the solution, this mark, the final answer.
ANSWER_MARK = "####"
SURROGATE_PAIR = re.compile(r"\\u[dD][89abAB]\w\w\\u[dD][c-fC-F]\w\w")
# The share of a reasoning-gym family that is kept for evaluation, chosen by a hash of the question.
HELD_OUT_SHARE = 0.1
# Families of reasoning-gym where the given answer is one of several right ones.
MANY_ANSWERS = frozenset(
    "boxnet codeio countdown graph_color group_anagrams intermediate_integration jugs kakurasu knight_swap n_queens "
    "palindrome_generation palindrome_partitioning polynomial_equations propositional_logic puzzle24 quantum_lock "
    "rubiks_cube rush_hour shortest_path simple_integration sokoban survo tower_of_hanoi word_ladder".split()
)


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns of a JSONL file or TensorFlow dataset make an example; config.data.*_column and config.data.grader.

    Without `id`, a column of that name is taken where there is one, else the record's place. Without `answer`, records
    need none: instructions that no rule grades.
    """

    question: str = "question"
    answer: str | None = "answer"
    id: str | None = None
    level: str | None = None
    grader: str = "math"


def read_jsonl(path: str | os.PathLike[str], columns: Columns) -> list[Example]:
    """The examples of a JSON Lines file (UTF-8, perhaps with a byte order mark or gzipped), blank lines left out.

    Raises:
        ValueError: a missing file; a line that is not an object of valid JSON and UTF-8, named with file, line and
            column; a missing column, with those that are there; an id that stands twice.
    """
    path = pathlib.Path(path)
    examples, line_of = [], {}
    for number, record in read_records(path, "config.data.source"):
        where = f"{path}, line {number}"
        example = to_example(record, columns, f"{path.name.split('.')[0]}-{number}", where)
        if (first := line_of.setdefault(example["id"], number)) != number:
            raise ValueError(f"{where}: id {example['id']!r} already stands in line {first}; set config.data.id_column")
        examples.append(example)
    return examples


def read_records(path: str | os.PathLike[str], key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of a JSON Lines file; `key` names it in errors, which are those of `read_jsonl`."""
    for number, line in _numbered_lines(pathlib.Path(path), key):
        yield number, _parse(line, f"{path}, line {number}")


def _numbered_lines(path: pathlib.Path, key: str) -> Iterator[tuple[int, bytes]]:
    # In bytes: a text file would also end lines where Unicode may, and JSON strings may hold such characters.
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        raise ValueError(f"{key}: there is no file {path}") from None
    except (OSError, EOFError) as error:
        raise ValueError(f"{key}: cannot read {path}: {error}") from error


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}, column {error.colno}: not valid JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode("utf-8")) + 1
        raise ValueError(f"{where}, column {column}: not valid UTF-8: {error.reason}") from None
    except UnicodeEncodeError:
        column = SURROGATE_PAIR.sub("_" * 12, line.decode("utf-8")).lower().find("\\ud") + 1
        raise ValueError(f"{where}, column {column}: half of a surrogate pair, which is no character") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, endless brackets
        raise ValueError(f"{where}, column 1: not usable: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}, column 1: must be a JSON object with columns, not {type(record).__name__}")
    return record


def to_example(record: dict[str, Any], columns: Columns, default_id: str, where: str) -> Example:
    """A record as an example: chosen columns under their standard names, the others as they are.

    A text answer is what follows the last `####`, if there is one.

    Raises:
        ValueError: a missing column, an empty question or answer, or a level that is no number.
    """
    chosen = {role: getattr(columns, role) for role in ("question", "answer", "id", "level")}
    for role, column in chosen.items():
        if column is not None and column not in record:
            raise ValueError(
                f"{where}: no column {column!r}; set config.data.{role}_column to one of {', '.join(record)}"
            )
    question, answer = record[columns.question], record[columns.answer] if columns.answer else record.get("answer")
    if isinstance(answer, str | int | float):
        answer = str(answer).rpartition(ANSWER_MARK)[2].strip()
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{where}: column {columns.question!r} must be a question, got {question!r}")
    if columns.answer and answer in (None, ""):
        raise ValueError(f"{where}: column {columns.answer!r} must be an answer, got {record[columns.answer]!r}")
    example = {**record, "question": question, "answer": answer, "grader": columns.grader}
    example["id"] = str(record.get(columns.id or "id", default_id))
    if columns.level is not None:
        example["level"] = record[columns.level]
        if not isinstance(example["level"], int | float):
            raise ValueError(f"{where}: column {columns.level!r} must be a number, got {example['level']!r}")
    return example


def read_tfds(name: str, split: str, columns: Columns) -> list[Example]:
    """The examples of a TensorFlow dataset; see `tfds_records`."""
    return [
        to_example(record, columns, f"{name}-{i}", where) for i, (where, record) in enumerate(tfds_records(name, split))
    ]


def tfds_records(name: str, split: str) -> list[tuple[str, dict[str, Any]]]:
    """Place and record, of a prepared TensorFlow dataset such as "gsm8k", from ArrayRecord files without TensorFlow.

    Nothing is downloaded here: on a pod every host would do it, each at its own pace.

    Raises:
        ValueError: no such dataset, split or column; a dataset that is not prepared, with the folder and the remedy.
    """
    import tensorflow_datasets as tfds  # half a second, which few runs need

    spec = f"config.data.source 'tfds:{name}'"
    tfds.text.__name__  # noqa: B018  (a lazy import, which registers the text datasets)
    try:
        builder = tfds.builder(name, data_dir=os.environ.get("TFDS_DATA_DIR"), file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        raise ValueError(f"{spec}: TensorFlow Datasets {tfds.__version__} knows no such dataset") from None
    if not builder.info.splits:
        remedy = f"tfds.text; tfds.builder({name!r}, file_format='array_record').download_and_prepare()"
        raise ValueError(
            f"{spec} is not prepared in {builder.data_dir} (set TFDS_DATA_DIR for another folder). "
            f'Once, with a network: python -c "import tensorflow_datasets as tfds; {remedy}"'
        )
    try:
        records = builder.as_data_source(split=split)
    except NotImplementedError:
        raise ValueError(
            f"{spec}: {builder.data_dir} holds {builder.info.file_format.value} files, which only TensorFlow reads; "
            "prepare it anew elsewhere (TFDS_DATA_DIR) with file_format='array_record'"
        ) from None
    except ValueError:
        known = ", ".join(builder.info.splits)
        raise ValueError(f"config.data.split {split!r} is none of {spec}; it has {known}") from None
    return [(f"tfds:{name}[{i}]", _plain(record)) for i, record in enumerate(records)]


def _plain(value: Any) -> Any:
    """What TensorFlow Datasets hands out, as JSON would have it: text is bytes there, a number a numpy scalar."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | np.ndarray) and np.ndim(value) > 0:
        return [_plain(one) for one in value]
    value = value.decode("utf-8") if isinstance(value, bytes) else value
    return value.item() if isinstance(value, np.generic) else value


def generate_reasoning_gym(family: str, split: str, size: int, seed: int) -> list[Example]:
    """Problems of a reasoning-gym family; only its generators are used, the grading is ours.

    Of `size` problems, repeated ones are left out; a hash of the question says which belong to "train" and which to
    "test", so that the splits share none even where a family is small.

    Raises:
        ValueError: reasoning-gym is not installed; no such family or split; a family in MANY_ANSWERS.
    """
    try:
        import reasoning_gym
    except ImportError:
        raise ValueError("config.data.source 'reasoning_gym:...' needs the package: pip install 'r1jax[gym]'") from None
    spec = f"config.data.source 'reasoning_gym:{family}'"
    if split not in ("train", "test"):
        raise ValueError(f"config.data.split {split!r} is none of {spec}; it has train, test")
    if family in MANY_ANSWERS:
        raise ValueError(
            f"{spec}: its problems have many right answers, and comparing with one of them would be unfair"
        )
    try:
        problems = reasoning_gym.create_dataset(family, size=size, seed=seed)
    except ValueError as error:
        close = difflib.get_close_matches(family, reasoning_gym.factory.DATASETS)
        raise ValueError(f"{spec}: {error}; near it: {', '.join(close) or 'none'}") from None
    examples = {}
    for i, problem in enumerate(problems):
        question, answer = problem["question"].strip(), str(problem["answer"])
        if (_share(question) < HELD_OUT_SHARE) == (split == "test"):
            record = {"id": f"{family}-{seed}-{i}", "question": question, "answer": answer, "grader": "math"}
            examples[question] = record
    return list(examples.values())


def _share(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") / 2**64
