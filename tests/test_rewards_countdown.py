"""Laws of the Countdown grader."""

import random
import time

import pytest

from r1jax.countdown import attempts, expression_of
from r1jax.rewards import countdown

EXAMPLE = {"id": "c1", "answer": {"numbers": [3, 5, 7], "target": 26}, "grader": "countdown"}


def completion(answer):
    return f"<think>let me see</think> <answer>{answer}</answer>"


def grade(answer, example=EXAMPLE):
    return countdown.grade(completion(answer), example)


def form(text):
    return countdown.read(text).normal_form


@pytest.mark.parametrize(
    "answer",
    ["3*7+5", "(3*7)+5", " 5 + ( 7 * 3 ) ", "((5))+7×3", "7·3+5", "7⋅3 + 5", "3*7+5 = 26", "3*7+5=26", "(((3*7)+5))"],
)
def test_every_spelling_of_a_solution_is_accepted(answer):
    assert grade(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "26",
        "3*7",
        "3*7+5+0",
        "3*7+5-5+5",
        "5*5+1",
        "7*5-3",
        "3*7+5=27",
        "3*7+5=26=26",
        "26=3*7+5",
        "3*7+5 is it",
        "answer: 3*7+5",
        "3*7+5;import os",
        "__import__('os')",
        "3*7+5.0",
        "37+5",
        "3 7 5",
        "3**7+5",
        "+3*7+5",
        "-3+5*7",
        "3*(7+5",
        "3*7)+5",
        "()3*7+5",
        "3*7+",
        "",
        "٣*7+5",
    ],
)
def test_anything_else_is_refused(answer):
    assert not grade(answer)


def test_the_typographic_minus_subtracts():
    assert grade("7*5−3", {"answer": {"numbers": [7, 3, 5], "target": 32}})


def test_numbers_count_as_often_as_they_are_given():
    twice = {"answer": {"numbers": [4, 4, 2], "target": 10}}
    assert grade("4+4+2", twice)
    assert not grade("4+2+2+2", twice)
    assert not grade("4+4+2", {"answer": {"numbers": [4, 2, 8], "target": 10}})


def test_an_answer_inside_the_thought_is_none():
    assert not countdown.grade("<think><answer>3*7+5</answer></think> 12", EXAMPLE)
    assert not countdown.grade("<think><answer>3*7+5</answer>", EXAMPLE)
    assert countdown.answer("<think><answer>3*7+5</answer></think>", EXAMPLE) is None


def test_the_last_answer_counts():
    assert not countdown.grade(completion("3*7+5") + "<answer>3+7+5</answer>", EXAMPLE)


def test_the_normal_form_forgets_order_and_grouping_only():
    assert form("7*3+5") == form("5+(3*7)") == form("(7*3)+5=26")
    assert form("(8-3)*2") == form("2*(8-3)") == form("((8)-3)*(2)")
    assert form("9-(4-2)") == form("9+2-4") == form("2+(9-4)")
    assert form("(2*3)*4") == form("2*(4*3)")
    different = ["3*7+5", "3*(7+5)", "7-3+5", "7-(3+5)", "3-7+5", "7*5-3", "5*3-7", "3+5+7", "(7-3)*5", "(5-3)*7"]
    assert len({form(text) for text in different}) == len(different)


def random_expression(draw, numbers):
    if len(numbers) == 1:
        return str(numbers[0])
    cut = draw.randint(1, len(numbers) - 1)
    left, right = random_expression(draw, numbers[:cut]), random_expression(draw, numbers[cut:])
    return f"({left}){draw.choice('+-*')}({right})"


def test_the_normal_form_is_stable_and_keeps_value_and_numbers():
    draw = random.Random(0)
    for _ in range(100):
        text = random_expression(draw, [draw.randint(1, 12) for _ in range(draw.randint(1, 6))])
        first = countdown.read(text)
        again = countdown.read(first.normal_form)
        assert first == again
        assert first.value == eval(text)  # the test's own text, so it is safe


def test_equal_answers_have_equal_grades():
    draw, grades = random.Random(1), {}
    for _ in range(500):
        numbers = draw.sample([3, 5, 7], 3) if draw.random() < 0.7 else [draw.randint(1, 9) for _ in range(3)]
        text = random_expression(draw, numbers) + draw.choice(["", "", "=26", "=25"])
        grades.setdefault(countdown.answer(completion(text), EXAMPLE), set()).add(grade(text))
    assert all(len(seen) == 1 for seen in grades.values())
    assert {True} in grades.values() and {False} in grades.values()


@pytest.mark.parametrize("bare", [False, True])
def test_every_worked_solution_of_the_task_is_accepted(bare):
    for numbers in [(3, 5, 7), (1, 1, 1), (2, 2, 11), (4, 18, 20), (1, 9, 10)]:
        for attempt in attempts(numbers):
            example = {"answer": {"numbers": list(numbers), "target": attempt.result}}
            assert grade(expression_of(attempt, bare), example), attempt


def test_hostile_text_is_refused_at_once():
    start_s = time.process_time()
    for text in [
        "(" * 100_000,
        "1+" * 100_000 + "1",
        "9" * 100_000,
        "(" * 60 + "1" + ")" * 60,
        "9" * 13,
        "1=" + "1" * 99,
    ]:
        assert countdown.read(text) is None
        assert not grade(text)
    assert countdown.read("*".join(["9"] * 200)).value == 9**200
    assert time.process_time() - start_s < 1.0


@pytest.mark.parametrize(
    ("gold", "field"),
    [
        ("26", "'answer'"),
        (None, "'answer'"),
        ({"numbers": "3,5,7", "target": 26}, "answer.numbers"),
        ({"numbers": [], "target": 26}, "answer.numbers"),
        ({"numbers": [3, 5.0, 7], "target": 26}, "answer.numbers"),
        ({"numbers": [3, -5, 7], "target": 26}, "answer.numbers"),
        ({"target": 26}, "answer.numbers"),
        ({"numbers": [3, 5, 7]}, "answer.target"),
        ({"numbers": [3, 5, 7], "target": "26"}, "answer.target"),
    ],
)
def test_a_wrong_gold_is_named(gold, field):
    with pytest.raises(ValueError, match=f"c9.*{field}"):
        countdown.check_example({"id": "c9", "answer": gold})
    countdown.check_example(EXAMPLE)
