"""Laws of the answer grader for mathematics."""

import json
import pathlib
import random
import time

import pytest

from r1jax.rewards import math
from r1jax.rewards.math import canonical, equivalent, extract_answer, grade_many

SAMPLE = pathlib.Path(__file__).parent / "data" / "gsm8k_sample.jsonl"
SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"

SAME = [
    ("72", "72"),
    ("72", " 72. "),
    ("72", "$72$"),
    ("72", r"\(72\)"),
    ("72", "72.0"),
    ("72", "+72"),
    ("-4", "−4"),
    ("1234", "1,234"),
    ("1234", r"1{,}234"),
    ("11111111100", r"11,\! 111,\! 111,\! 100"),
    ("12.5", r"\$12.50"),
    ("12.5", "$12.50"),
    ("12.5", r"12.5\text{ dollars}"),
    ("10", "10 meters"),
    ("15", r"15\mbox{ cm}^2"),
    ("90", r"90^\circ"),
    ("28%", "28"),
    ("28%", "0.28"),
    ("28", r"28\%"),
    ("0.5", "1/2"),
    ("1/2", r"\frac{1}{2}"),
    ("1/2", r"\tfrac12"),
    ("8/46", r"\dfrac{4}{23}"),
    ("-1/2", r"\frac{-1}{2}"),
    ("-1/2", r"\frac{1}{-2}"),
    ("7.75", r"7\frac{3}{4}"),
    ("-1.5", "-1 1/2"),
    ("3/8", r"\frac12\frac34"),
    ("1024", "2^{10}"),
    ("3628800", "10!"),
    (r"\sqrt{2}", r"\sqrt2"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    ("2", r"\sqrt[3]{8}"),
    (r"4\pi", r"4 \cdot \pi"),
    ("-1", r"e^{i\pi}"),
    ("0.1", "0.10000000000000001"),
    ("1/3", "0.3333333333333333"),
    ("x^2-1", "(x-1)(x+1)"),
    (r"\frac{1}{x}", "x^{-1}"),
    ("e^{x+y}", "e^{(y+x)}"),
    ("5", "x = 5"),
    ("A", "(A)"),
    ("A", r"\text{A}"),
    (r"\text{Evelyn}", "evelyn"),
    ("(6,31,-1)", r"\left( 6, 31, -1 \right)"),
    (r"(\frac{1}{2},3)", "(0.5,3)"),
    (r"\{1,2,3\}", r"\{3, 1, 2\}"),
    ("19, 46, and 82", r"46, 19, \text{ and } 82"),
]
DIFFERENT = [
    ("72", "73"),
    ("5", "-5"),
    ("5", "5x"),
    ("5", "5!"),
    ("5", "5 million"),
    ("5", r"5\text{ hundred}"),
    ("5", ""),
    ("3", r"3 \text{ or } 4"),
    ("12", "1 2"),
    ("1000", "1.000"),
    ("1000", "1 000 5"),
    ("11/2", "1 1/2"),
    ("1/3", "0.333"),
    ("2", r"1.5\frac{1}{2}"),
    ("0.28", "28"),
    ("28%", "28.5%"),
    (r"5 \text{ feet}", r"5 \text{ inches}"),
    (r"\$5", "5 cents"),
    (r"\pi", "3.14159"),
    ("4", r"4\sqrt{2}"),
    (r"\sqrt{x^2}", "x"),
    ("2^{100}", "2^{99}"),
    ("123456789012345678901234567890", "123456789012345678901234567891"),
    ("x", "y"),
    ("x = 5", "y = 5"),
    ("1112112_3", "1112122_3"),
    (r"\pm 2021", "2021"),
    (r"\infty", r"-\infty"),
    ("(0,9)", "[0,9)"),
    ("(1,2)", "(2,1)"),
    ("1,2,3", "1,2"),
    ("(100,200)", "100200"),
    (r"\text{Friday}", r"\text{Monday}"),
    ("east", "seat"),
    ("3", "eval('1+2')"),
]
HOSTILE = [
    "9^9^9^9",
    "9**9**9**9",
    "2^" * 150 + "2",
    "200!!!",
    "(" * 390,
    "(" * 150 + "1" + ")" * 150,
    r"\frac" * 70,
    r"\sqrt" * 70 + "2",
    "1/" * 190 + "0",
    r"\sin(10^{4000})",
    "e^{e^{e^{e^e}}}",
    "(1+1/10^{1000})^{10^{1000}}",
    "(x+y)^{4000}",
    "x^" * 190 + "x",
    "(" + "+".join("xyzuvw" * 8) + ")^{60}",
    r"\{" + ",".join(rf"\{{{i},{i + 1}\}}" for i in range(30)) + r"\}",
    ", and " * 60,
    "9" * 400,
    "9" * 200_000,
    "1e999999999",
    "nan",
    "1/0",
    "0^0",
    "\x00",
    "\ud800",
    "\\",
    "%",
    "$",
    "{}",
]


@pytest.mark.parametrize(("gold", "answer"), SAME)
def test_the_same_value_is_accepted_both_ways(gold, answer):
    assert equivalent(gold, answer)
    assert equivalent(answer, gold)


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_another_value_is_refused_both_ways(gold, answer):
    assert not equivalent(gold, answer)
    assert not equivalent(answer, gold)


def test_hostile_text_neither_raises_nor_takes_long():
    for text in HOSTILE:
        start_s = time.process_time()
        assert equivalent(text, text)
        assert not equivalent(f"{text}+1", text)
        assert not equivalent("5", text)
        assert not equivalent(text, "x+1")
        canonical(text)
        assert time.process_time() - start_s < 2.0, text[:40]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{1} or rather \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("<think>a</think> <answer> 7 </answer>", "7"),
        (r"<think>a</think> <answer>\boxed{8}</answer>", "8"),
        (r"<think>a</think> <answer>the number is $\boxed{8}$</answer> .", "8"),
        (r"\boxed{1} <answer>2</answer>", "2"),
        (r"<answer>1</answer> \boxed{2}", "2"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{5", None),
        (r"\boxed{4} and \boxed{5", "4"),
        ("<answer>5", None),
        ("the answer is 5", "5"),
        ("The answer is 5. I hope it is correct.", "5"),
        (r"It was \boxed{255} then. Final Answer: The final answer is $10,455$. I hope it is correct.", "10,455"),
        (r"**Final Answer:** $\boxed{3}$", "3"),
        (r"$\boxed{-2} \quad \text{and} \quad \boxed{1}$", "-2, 1"),
        (r"\boxed{3} or \boxed{4}", "3, 4"),
        (r"\boxed{3}, that is to say \boxed{4}", "4"),
        ("3 + 4 = 7\n#### 7", "7"),
        ("答案是 13/28。", "13/28"),
        ("réponse est (35 + 70 = 105).", "105"),
        ("B。不是 A", "B"),
        (r"so $(x, y) = (7, 6)$. <|im_start|>user \boxed{1}", "(x, y) = (7, 6)"),
        ("<think>the answer is 5", None),
        ("The answer is 3 or 4.", "3 or 4"),
        ("The answer is $x=3$ or maybe $x=4$.", "x=3 or x=4"),
        ("", None),
        (r"<think>\boxed{5}</think>", None),
        (r"<think>it is \boxed{5}", None),
        (r"<think>\boxed{5}</think> no, \boxed{6}", "6"),
        (r"thought \boxed{5}</think> <answer>6</answer>", "6"),
        (r"<think>a</think> <answer>6</answer> <think>\boxed{7}", None),
    ],
)
def test_the_last_box_or_answer_outside_the_thought_is_the_answer(completion, answer):
    assert extract_answer(completion) == answer


@pytest.mark.parametrize("text", ["\\boxed{", "{", "<answer>", "</answer>", "<think>", "\\boxed{}", "\\"])
def test_extraction_takes_linear_time(text):
    start_s = time.process_time()
    extract_answer(text * (200_000 // len(text)))
    assert time.process_time() - start_s < 2.0


def test_a_vote_counts_equal_answers_together_and_others_apart():
    assert len({canonical(text) for text in ["0.5", "1/2", r"\frac{1}{2}", r"\frac{3}{6}", "$0.50$", ".5"]}) == 1
    assert canonical("1, 2") == canonical("2,1") != canonical("(2,1)")
    assert canonical("Paris") == canonical(r"\text{paris}") != canonical("London")
    # Names and units are left out of a vote, because most answers leave them out.
    left_out = {"y = 5", "5 cents", r"5 \text{ inches}"}
    assert {answer for gold, answer in DIFFERENT if canonical(gold) == canonical(answer)} == left_out


def test_a_completion_is_graded_by_its_final_answer():
    example = {"answer": "18"}
    assert math.grade("<think>12</think> <answer>18</answer>", example)
    assert not math.grade("<think>18</think> <answer>12</answer>", example)
    assert not math.grade("<think>18</think>", example)
    assert math.answer("<think>12</think> <answer>18.0</answer>", example) == "18"
    assert math.answer("<think>12</think>", example) is None
    assert math.grade("<answer>18</answer>", {"answer": 18})


@pytest.mark.parametrize("gold", [None, "", "  ", True, ["5"], {"numbers": [5]}])
def test_a_wrong_gold_is_named(gold):
    with pytest.raises(ValueError, match="m1.*'answer'"):
        math.check_example({"id": "m1", "answer": gold})
    math.check_example({"id": "m1", "answer": "5"})


def test_references_grade_as_correct_and_those_of_others_do_not():
    golds = [json.loads(line)["answer"] for line in SAMPLE.read_text("utf-8").splitlines()]
    assert len(golds) == 20
    for gold in golds:
        for other in golds:
            assert equivalent(gold, f"{other}.00") == (gold == other)


@pytest.mark.parametrize("name", ["gsm8k_test", "svamp", "math500"])
def test_whole_sets_of_references(name):
    path = SHARED / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    golds = [json.loads(line)["answer"] for line in path.read_text("utf-8").splitlines()][:300]
    partners = random.Random(0).sample(golds, len(golds))
    assert all(math.grade(rf"<think>it is 7</think> \boxed{{{gold}}}", {"answer": gold}) for gold in golds)
    accepted = [(gold, other) for gold, other in zip(golds, partners, strict=True) if equivalent(gold, other)]
    assert all(gold == other for gold, other in accepted)


def test_labelled_examples_bring_no_false_accept_and_few_false_rejects():
    path = SHARED / "verifier_examples.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for tier, least in (("core", 0.99), ("extra", 0.96)):
        cases = [row for row in rows if row["tier"] == tier]
        verdicts = [
            math.grade(
                row["prediction"] if row["kind"] == "response" else rf"\boxed{{{row['prediction']}}}",
                {"answer": row["gold"]},
            )
            for row in cases
        ]
        pairs = list(zip(cases, verdicts, strict=True))
        assert len(cases) > 80 and not [row["id"] for row, verdict in pairs if verdict and not row["equal"]]
        assert sum(verdict == row["equal"] for row, verdict in pairs) >= least * len(cases)


def test_a_batch_in_processes_agrees_with_one_by_one():
    pairs = [*SAME[:10], *DIFFERENT[:10], ("9" * 300, "9^9^9^9")]
    assert grade_many(pairs, workers=2) == [equivalent(*pair) for pair in pairs]
    assert grade_many([]) == []
