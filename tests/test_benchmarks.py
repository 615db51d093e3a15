"""Benchmarks: every published layout becomes a problem that its grader can grade; other columns are a clear error."""

import base64
import json
import pathlib
import pickle
import zlib

import pytest

from r1jax import benchmarks
from r1jax.rewards.table import GRADERS, check_examples

SHARED = pathlib.Path(__file__).resolve().parent.parent.parent / "shared" / "data"
FILES = {
    "math500": ("math500", 500),
    "math": ("math_rest4500", 4500),
    "aime24": ("aime24", 30),
    "aime25": ("aime25", 30),
    "gsm8k": ("gsm8k_test", 1319),
    "svamp": ("svamp", 1000),
    "cmath": ("cmath_zh", 600),
    "humaneval": ("humaneval", 164),
    "mbpp": ("mbpp", 500),
    "ifeval": ("ifeval", 541),
}
STDIN = {"input": "1 2\n", "output": "3\n", "testtype": "stdin"}
CALL = {"input": "[1, 2]\n3", "output": "6", "testtype": "functional"}
HIDDEN = base64.b64encode(zlib.compress(pickle.dumps(json.dumps([CALL])))).decode()
LEETCODE = {
    "question_content": "Add them.",
    "starter_code": "class Solution:\n    def total(self, a, b):",
    "public_test_cases": json.dumps([CALL]),
    "private_test_cases": HIDDEN,
    "metadata": json.dumps({"func_name": "total"}),
}
SUM = "<think>so</think>```python\nclass Solution:\n    def total(self, a, b):\n        return sum(a) + b\n```"
GPQA = {"Question": "Which?", "Correct Answer": "iron", **{f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)}}

# Benchmark, a record as it is published, the gold, a right and a wrong completion.
LAYOUTS = [
    ("math", {"problem": "1+1?", "solution": r"So \boxed{\frac{4}{2}}.", "level": "Level 2"}, r"\frac{4}{2}", "2", "3"),
    ("aime24", {"ID": "x", "Problem": "1+1?", "Answer": 2}, "2", "2", "3"),
    ("gsm8k", {"question": "1+1?", "answer": "It is <<1+1=2>>2.\n#### 2"}, "2", "2", "3"),
    ("cmath", {"question": "一加一？", "golden": "2"}, "2", "2", "3"),
    ("svamp", {"Body": "Tom has 1.", "Question": "And 1 more?", "Answer": "2.0"}, "2.0", "2", "3"),
    ("mmlu", {"question": "Which?", "choices": ["red", "blue"], "answer": 1, "subject": "art"}, "B", "B", "A"),
    ("mmlu_pro", {"question": "Which?", "options": [*"pqrstuvwxy"], "answer": "J", "answer_index": 9}, "J", "J", "I"),
    ("ceval", {"question": "哪？", **dict(zip("ABCD", "甲乙丙丁", strict=True)), "answer": "C"}, "C", "C", "D"),
    ("drop", {"passage": "P.", "question": "Who?", "answers_spans": {"spans": ["Tom B"]}}, ["Tom B"], "Tom B", "Al"),
    ("drop", {"context": "P. Who?", "ref_text": "Tom|Tom Brady"}, ["Tom", "Tom Brady"], "tom", "Al"),
    ("drop", {"passage": "P.", "question": "Who?", "answer": "Tom"}, ["Tom"], "the Tom", "Al"),
]  # fmt: skip


def one(tmp_path: pathlib.Path, name: str, *records: dict) -> list[dict]:
    path = tmp_path / "file.jsonl"
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    examples = benchmarks.read(benchmarks.parse(f"{name}={path}"))
    check_examples(examples, ["accuracy"])
    return examples


@pytest.mark.parametrize("name", FILES)
def test_files_of_the_shared_data_load_as_they_are(name: str) -> None:
    file, n = FILES[name]
    path = SHARED / f"{file}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    examples = benchmarks.read(benchmarks.parse(f"{name}={path}"))
    assert len(examples) == len({example["id"] for example in examples}) == n
    check_examples(examples[:100], ["accuracy"])
    assert all(example["asked"] in example["question"] for example in examples)
    if examples[0]["grader"] == "math":
        said = (f"<think>so</think>\\boxed{{{example['answer']}}}" for example in examples)
        assert all(GRADERS["math"].grade(text, example) for text, example in zip(said, examples, strict=True))


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_reference_programs_pass_as_completions(name: str) -> None:
    path = SHARED / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    solutions = {}
    for line in path.read_text("utf-8").splitlines():
        record = json.loads(line)
        solutions[str(record["id"])] = (record["prompt"] if name == "humaneval" else "") + record["solution"]
    for example in benchmarks.read(benchmarks.parse(f"{name}={path}"))[:20]:
        program = solutions[example["id"].split("/", 1)[1]]
        assert GRADERS["code"].grade(f"<think>so</think>```python\n{program}\n```", example), example["id"]


@pytest.mark.parametrize(("name", "record", "gold", "right", "wrong"), LAYOUTS)
def test_published_layouts_are_graded(tmp_path, name, record, gold, right, wrong):
    (example,) = one(tmp_path, name, record)
    assert example["answer"] == gold
    grade = GRADERS[example["grader"]].grade
    said = {"math": r"\boxed{%s}", "choice": "Answer: %s", "exact": r"\boxed{%s}"}[example["grader"]]
    assert grade(f"<think>{wrong}</think>{said % right}", example)
    assert not grade(f"<think>{right}</think>{said % wrong}", example)


def test_gpqa_places_the_right_choice_by_the_question_alone(tmp_path):
    letters = set()
    for i in range(40):
        (example,) = one(tmp_path, "gpqa", {**GPQA, "Question": f"Which of {i}?"})
        assert f"{example['answer']}) iron" in example["question"]
        assert one(tmp_path, "gpqa", {**GPQA, "Question": f"Which of {i}?"}) == [example]
        letters.add(example["answer"])
    assert letters == set("ABCD")


def test_programs_of_contests_get_public_and_hidden_tests(tmp_path):
    (example,) = one(tmp_path, "livecodebench", LEETCODE)
    assert example["answer"] == [{"call": "total", "args": [[1, 2], 3], "expected": 6}] * 2
    assert "class Solution" in example["question"]
    by_input = {**LEETCODE, "starter_code": "", "public_test_cases": json.dumps([STDIN]), "private_test_cases": ""}
    (example,) = one(tmp_path, "livecodebench", by_input)
    assert example["answer"] == [{"input": "1 2\n", "output": "3\n"}] and "standard input" in example["question"]


def test_a_test_case_that_would_run_something_is_refused(tmp_path):
    evil = base64.b64encode(zlib.compress(pickle.dumps(pathlib.Path("/")))).decode()
    with pytest.raises(ValueError, match=r"line 1: no problem of livecodebench.*program"):
        one(tmp_path, "livecodebench", {**LEETCODE, "private_test_cases": evil})


def test_mbpp_is_its_test_split(tmp_path):
    records = [
        {"task_id": i, "text": "Add.", "test_list": ["assert f(1) == 2"], "test_setup_code": ""} for i in (2, 11)
    ]
    (example,) = one(tmp_path, "mbpp", *records, {**records[1], "task_id": 511})
    assert example["id"] == "mbpp/11" and example["answer"] == ["assert f(1) == 2"]


def test_other_columns_are_named_with_those_wanted(tmp_path):
    wanted = r"file.jsonl, line 2: gsm8k wants the columns problem, answer or .*; there are text, label"
    with pytest.raises(ValueError, match=wanted):
        one(tmp_path, "gsm8k", {"question": "1?", "answer": "1"}, {"text": "1?", "label": "1"})
    with pytest.raises(ValueError, match=r"line 1: there is no answer"):
        one(tmp_path, "gsm8k", {"question": "1?", "answer": ""})
    with pytest.raises(ValueError, match=r"no problem of math.*boxes no answer"):
        one(tmp_path, "math", {"problem": "1?", "solution": "none"})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("math500", r"wanted NAME=PATH.jsonl"),
        ("math50=a.jsonl", r"did you mean 'math500'\?"),
        ("math500=a.csv", r"source of math500 is 'a.csv'"),
        ("math500=nowhere.jsonl", r"config.eval.benchmarks \(math500\): there is no file nowhere.jsonl"),
    ],
)
def test_entries_that_cannot_be_are_refused(entry, message):
    with pytest.raises(ValueError, match=message):
        benchmarks.read(benchmarks.parse(entry))
