"""Laws of the table of rewards: names and import paths, what a wrong one says, golds checked when data is loaded."""

import pytest

from r1jax.rewards.table import GRADERS, REWARDS, accuracy, canonical_answer, check_examples, resolve

COUNTDOWN = {"id": "c1", "grader": "countdown", "answer": {"numbers": [3, 5, 7], "target": 26}}
MATH = {"id": "m1", "grader": "math", "answer": "26"}


def test_a_name_of_the_table_is_found():
    assert {name: resolve(name) for name in REWARDS} == REWARDS


def test_a_function_is_found_by_its_import_path_and_by_its_file(tmp_path):
    assert resolve("r1jax.rewards.table:accuracy") is accuracy
    for folder, value in [("one", 1.0), ("two", 2.0)]:
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "mine.py"
        file.write_text(f"def reward(prompt, completion, example, **context):\n    return {value}\n")
        assert resolve(f"{file}:reward")("", "", {}) == value


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("acuracy", "did you mean 'accuracy'"),
        ("nothing_like_it", "wanted one of accuracy, format"),
        ("no_such_package.rewards:f", "cannot import 'no_such_package.rewards'"),
        ("no/such/file.py:f", "cannot import 'no/such/file.py'"),
        ("r1jax.rewards.table:acuracy", "did you mean 'accuracy'"),
        ("r1jax.rewards.table:REWARDS", "no function 'REWARDS'"),
    ],
)
def test_an_unknown_reward_names_the_key_and_the_nearest(name, says):
    with pytest.raises(ValueError, match="config.rewards") as raised:
        resolve(name)
    assert says in str(raised.value)


def test_a_file_that_does_not_import_says_why(tmp_path):
    (tmp_path / "bad.py").write_text("1 / 0\n")
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        resolve(f"{tmp_path / 'bad.py'}:reward")


def test_accuracy_asks_the_grader_that_the_example_names():
    completion = "<think>a</think> <answer>3*7+5</answer>"
    assert accuracy("", completion, COUNTDOWN) == 1.0
    assert accuracy("", completion, MATH) == 1.0
    assert accuracy("", completion, {**MATH, "answer": "27"}) == 0.0
    assert resolve("math")("", completion, {"answer": "26"}) == 1.0
    assert resolve("countdown")("", completion, {"answer": COUNTDOWN["answer"]}) == 1.0
    assert canonical_answer("", completion, COUNTDOWN) == "5+3*7"
    assert canonical_answer("", completion, MATH) == "26"
    assert canonical_answer("", completion, {"grader": "judge"}) is None
    with pytest.raises(ValueError, match="did you mean 'math'"):
        accuracy("", completion, {**MATH, "grader": "maths"})


def test_a_thought_that_the_prompt_opened_is_not_read_for_the_answer():
    assert accuracy("Assistant: <think>\n", r"it may be \boxed{26}", MATH) == 0.0
    assert accuracy("Assistant: <think>\n", r"it may be </think> \boxed{26}", MATH) == 1.0


@pytest.mark.parametrize(
    ("completion", "is_marked"),
    [
        (r"so \boxed{26}.", True),
        ("<answer>26</answer>", True),
        ("3 + 23 = 26\n#### 26", True),
        ("The answer is 26.", False),
        ("Final answer: 26", False),
        ("26", False),
        (r"\boxed{26", False),
        (r"\boxed{25} No: the final answer is 26.", False),
        (r"<think>\boxed{26}</think> The answer is 26.", False),
    ],
)
def test_where_a_mark_is_asked_for_only_a_marked_answer_counts(completion, is_marked):
    text = {**MATH, "grader": "exact"}
    for example in (MATH, text):
        assert accuracy("", completion, example, marked_answers=True) == is_marked
        assert (canonical_answer("", completion, example, marked_answers=True) in ("26", "26.0")) == is_marked
    assert resolve("f1")("", completion, text, marked_answers=True) == is_marked
    closed = completion != r"\boxed{26"
    assert accuracy("", completion, MATH) == closed, "unless somebody else's habits are judged"
    choice = {"id": "x", "grader": "choice", "answer": "B"}
    assert accuracy("", completion.replace("26", "B"), choice, marked_answers=True) == is_marked


def test_programs_and_countdown_need_no_other_mark_than_their_own():
    assert accuracy("", "<think>a</think> <answer>3*7+5</answer>", COUNTDOWN, marked_answers=True) == 1.0
    assert not GRADERS["code"].finds_unmarked


def test_golds_are_checked_by_the_graders_that_will_read_them():
    check_examples([COUNTDOWN, MATH], ["accuracy", "format"])
    check_examples([{"id": "x", "grader": "judge", "answer": 5}], ["mine:reward"])
    for example, rewards, says in [
        ({**COUNTDOWN, "answer": "26"}, ["accuracy"], "'c1'.*'answer'"),
        ({**MATH, "answer": None}, ["mine:reward"], "'m1'.*'answer'"),
        ({**MATH, "grader": "maths"}, ["accuracy"], "'m1'.*'grader'.*did you mean 'math'"),
        ({"id": "x", "answer": "1"}, ["accuracy"], "'x'.*'grader' is None"),
        ({"id": "x", "grader": "judge", "answer": None}, ["math"], "'x'.*'answer'"),
    ]:
        with pytest.raises(ValueError, match=says):
            check_examples([MATH, example], rewards)
