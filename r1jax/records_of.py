"""Records of published benchmark files as questions and answers, one function per family of layouts.

Beside each stands which columns it accepts, by whose files: those of the data sets' authors and of their copies on the
hub. Each gives question, answer and what else the grader reads.
"""

import base64
import hashlib
import io
import json
import pickle
import random
import zlib
from collections.abc import Mapping
from typing import Any

from r1jax.rewards.exact import LETTERS
from r1jax.rewards.latex import boxes

Record = Mapping[str, Any]
ANSWER_MARK = "####"


def _first(record: Record, *names: str) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


# MATH-500 and MATH (the answer is the solution's last box), AIME, GSM8K, CMATH ("golden"), SVAMP ("Body").
PROBLEMS = (
    ("problem", "answer"),
    ("question", "answer"),
    ("Problem", "Answer"),
    ("question", "golden"),
    ("Body", "Question", "Answer"),
    ("problem", "solution"),
)


def problem(record: Record) -> dict[str, Any]:
    """A problem whose answer is a number or a formula."""
    question = _first(record, "problem", "question", "Problem")
    if question is None:
        question = f"{record['Body'].strip().rstrip('.')}. {record['Question'].strip()}"
    answer = _first(record, "answer", "Answer", "golden")
    if answer is None:
        solution = record["solution"]
        spans = boxes(solution)
        if not spans:
            raise ValueError("the solution boxes no answer")
        answer = solution[slice(*spans[-1])]
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    return {"question": question, "answer": str(answer).rpartition(ANSWER_MARK)[2].strip()}


# Choices as a list (MMLU, MMLU-Pro), one column each (C-Eval), the right one apart (GPQA).
CHOICES = (
    ("question", "choices", "answer"),
    ("question", "options", "answer"),
    ("question", "A", "B", "C", "D", "answer"),
    ("Question", "A", "B", "C", "D", "Answer"),
    ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
)


def choice(record: Record) -> dict[str, Any]:
    """A question with lettered choices; where the right one stands apart, their order is drawn by the question."""
    question = _first(record, "question", "Question")
    if "Correct Answer" in record:
        right = str(record["Correct Answer"]).strip()
        choices = [right, *(str(record[f"Incorrect Answer {i}"]).strip() for i in (1, 2, 3))]
        random.Random(hashlib.sha256(question.encode()).hexdigest()).shuffle(choices)
        answer: Any = choices.index(right)
    else:
        choices = _first(record, "choices", "options")
        if choices is None:
            choices = [record[letter] for letter in "ABCDEFGHIJ" if record.get(letter) is not None]
        choices = [str(one) for one in choices]
        answer = _first(record, "answer", "Answer")
    if isinstance(answer, str) and answer.strip().isdigit():
        answer = int(answer)
    lines = "\n".join(f"{LETTERS[i]}) {one}" for i, one in enumerate(choices))
    letter = LETTERS[answer] if isinstance(answer, int) else answer.strip()
    return {"question": f"{question.strip()}\n\n{lines}", "answer": letter, "choices": choices}


HUMANEVAL = (("prompt", "entry_point", "test"),)


def humaneval(record: Record) -> dict[str, Any]:
    """A function to complete: what it opens with (imports, other functions) stands before the program as well."""
    question = f"Complete this function:\n\n```python\n{record['prompt'].rstrip()}\n```"
    check = f"{record['test']}\n\ncheck({record['entry_point']})\n"
    return {"question": question, "answer": [{"code": check}], "setup": record["prompt"]}


# Google's full set, its sanitized one, and a set with the columns named otherwise.
MBPP = (("text", "test_list"), ("prompt", "test_list"), ("text", "tests"))


def mbpp(record: Record) -> dict[str, Any] | None:
    """A function to write, its tests shown; only problems of the test split (task 11 to 510)."""
    task = record.get("task_id")
    if record.get("split", "test") != "test" or (isinstance(task, int) and not 11 <= task <= 510):
        return None
    tests = list(_first(record, "test_list", "tests"))
    setup = _first(record, "setup", "test_setup_code") or "\n".join(record.get("test_imports") or ())
    question = "{}\n\nYour code must pass these tests:\n\n```python\n{}\n```".format(
        _first(record, "text", "prompt").strip(), "\n".join(tests)
    )
    return {"question": question, "answer": tests, "setup": setup}


LIVECODEBENCH = (
    ("question_content", "starter_code", "public_test_cases", "private_test_cases"),
    ("question_content", "starter_code", "public_test_cases"),
)


class _OnlyText(pickle.Unpickler):
    """Reads pickled plain values; anything that would import or call something is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"a test case that is a program ({module}.{name})")


def _cases(packed: Any) -> list[dict[str, Any]]:
    """Test cases as a list, as JSON, or as the published private ones: JSON, pickled, compressed, in base64."""
    if not packed:
        return []
    if isinstance(packed, str):
        try:
            packed = json.loads(packed)
        except ValueError:
            packed = _OnlyText(io.BytesIO(zlib.decompress(base64.b64decode(packed)))).load()
            packed = json.loads(packed)
    return list(packed)


def livecodebench(record: Record) -> dict[str, Any]:
    """A contest problem by standard input, or by a method of LeetCode's class Solution."""
    cases = _cases(record["public_test_cases"]) + _cases(record.get("private_test_cases"))
    metadata = record.get("metadata") or {}
    metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
    tests = []
    for case in cases:
        if case.get("testtype") == "functional":
            arguments = [json.loads(line) for line in case["input"].splitlines() if line.strip()]
            tests.append({"call": metadata["func_name"], "args": arguments, "expected": json.loads(case["output"])})
        else:
            tests.append({"input": case["input"], "output": case["output"]})
    question = record["question_content"].strip()
    if record["starter_code"].strip():
        question += f"\n\nBegin with this code:\n\n```python\n{record['starter_code'].rstrip()}\n```"
    else:
        question += "\n\nRead from standard input and print to standard output."
    return {"question": question, "answer": tests, "setup": "from typing import *"}


# DROP on the hub, as a TensorFlow dataset, and in simple-evals, where "|" divides the answers.
PASSAGES = (("passage", "question", "answers_spans"), ("passage", "question", "answer"), ("context", "ref_text"))


def passage(record: Record) -> dict[str, Any]:
    """A question on a passage; any of the annotators' answers is right."""
    if "ref_text" in record:
        question, golds = record["context"].strip(), record["ref_text"].split("|")
    else:
        question = f"{record['passage'].strip()}\n\nQuestion: {record['question'].strip()}"
        golds = record["answers_spans"]["spans"] if "answers_spans" in record else record["answer"]
    golds = [golds] if isinstance(golds, str | int | float) else list(golds)
    return {"question": question, "answer": [str(gold) for gold in dict.fromkeys(golds) if str(gold).strip()]}


INSTRUCTIONS = (("prompt", "instruction_id_list", "kwargs"), ("prompt", "instruction_ids", "kwargs"))


def instructions(record: Record) -> dict[str, Any]:
    """A prompt of IFEval and the constraints that are checked."""
    names = list(_first(record, "instruction_id_list", "instruction_ids"))
    return {
        "question": record["prompt"],
        "answer": ", ".join(names),
        "instruction_ids": names,
        "kwargs": [dict(one) for one in record["kwargs"]],
    }


# AlpacaEval, and other open-ended ones: an instruction and the reply of the baseline that a judge compares with.
REPLIES = (("instruction", "output"), ("prompt", "output"), ("question", "reference"), ("prompt", "reference"))


def reply(record: Record) -> dict[str, Any]:
    """An open-ended instruction and the baseline's reply."""
    return {
        "question": _first(record, "instruction", "prompt", "question"),
        "answer": _first(record, "output", "reference"),
    }
