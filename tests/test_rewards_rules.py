"""Laws of the other rules: language, multiple choice, exact and F1 answers, instructions, penalties, judges."""

import json
import pathlib

import pytest

from r1jax.rewards import exact, instructions
from r1jax.rewards.language import (
    consistency,
    identified_consistency,
    language_of,
    language_reward,
    reflection_count,
    words_by_script,
)
from r1jax.rewards.penalties import judged, length_penalty, repetition_penalty
from r1jax.rewards.table import REWARDS, check_examples

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.mark.parametrize(
    ("text", "language", "share"),
    [
        ("Let us add the two numbers", "en", 1.0),
        ("我们先求和", "zh", 1.0),
        ("我们先 add 求和", "zh", 5 / 6),
        ("we add 求和", "en", 0.5),
        ("Пусть x равно двум", "ru", 1.0),
        ("", "zh", 1.0),
        ("1 + 1 = 2", "zh", 1.0),
        (r"我们得 $\text{the answer is}$ \frac{a}{b} 好", "zh", 1.0),
        ("代码 ```python\nprint('hello world')\n``` 完成", "zh", 1.0),
        ("函数 `sorted list` 好", "zh", 1.0),
        ("设 x 为 y 的值", "zh", 1.0),
        ("東京に行きました", "ja", 1.0),
    ],
)
def test_the_share_of_words_in_the_language(text, language, share):
    assert consistency(text, language) == pytest.approx(share)


def test_the_language_is_that_of_the_question():
    assert language_of("小明有3个苹果") == "zh"
    assert language_of("How many?") == language_of("1+1") == "en"
    assert language_of("Сколько?") == "ru"
    example = {"question": "小明有3个苹果"}
    prompt = "A conversation between User and Assistant. User: 小明有3个苹果. Assistant:"
    assert language_reward(prompt, "<think>我们 add</think> <answer>three apples</answer>", example) == pytest.approx(
        2 / 3
    )
    assert language_reward(prompt + " <think>", "我们</think> <answer>three</answer>", example) == 1.0
    assert words_by_script("abc где 中文 don't") == {"LATIN": 2, "CYRILLIC": 1, "CJK": 2}
    assert reflection_count("", "<think>Wait, check this. But wait.</think> However", {}) == 4.0


def test_languages_of_one_script_are_told_apart_by_the_library():
    pytest.importorskip("py3langid")
    english, french = "We add the two numbers and then divide.", "On additionne les deux nombres puis on divise."
    assert identified_consistency(english, "en") == identified_consistency(french, "fr") == 1.0
    assert identified_consistency(f"{english} {french}", "fr") == pytest.approx(0.5, abs=0.1)
    assert identified_consistency(r"$x^2$", "fr") == 1.0


@pytest.mark.parametrize(
    ("completion", "letter"),
    [
        (r"<think>A?</think> The answer is \boxed{B}.", "B"),
        (r"\boxed{\text{(B)}}", "B"),
        ("<answer>B</answer>", "B"),
        ("<answer>(B) Paris</answer>", "B"),
        ("<answer>B. Paris</answer>", "B"),
        ("So the correct answer is (B) because A is wrong.", "B"),
        ("Answer: B", "B"),
        ("答案是B", "B"),
        (r"\boxed{A or B}", None),
        ("<answer>A, B</answer>", None),
        ("<answer>(A) (B)</answer>", None),
        ("<answer>Because</answer>", None),
        ("The correct answer is a metal.", None),
        ("The correct answer is A metal.", None),
        ("The answer is I think unclear.", None),
        ("Answer: I'm not sure", None),
        ("the answer is boxed", None),
        (r"\boxed{A metal}", None),
        ("The answer is A because it melts.", "A"),
        ("the answer is (b)", "B"),
        ("The answer is **B**.", "B"),
        ("The answer is: A", "A"),
        ("Option B is the correct choice.", "B"),
        (r"The correct option is $\boxed{\text{I}}$", "I"),
        ("正确答案是（B）。", "B"),
        ("答案应该选B", "B"),
        ("正确答案是：**B**", "B"),
        ("因此，故选：B", "B"),
        ("Answer：B", "B"),
        ("**B**", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("**Answer:** B", "B"),
        ("**Answer**: B\n\nThe other three are gases.", "B"),
        ("Answer: A\nI am sure.", "A"),
        ("The answer is A and not B.", "A"),
        ("答案是A 因为它是金属", "A"),
        ("Answer: a", None),
        ("The answer is I.e. nothing.", None),
        ("The correct thing: A gas", None),
        ("I'd say a metal.", None),
        ("<think>the answer is B", None),
        ("", None),
    ],
)
def test_the_letter_that_is_chosen(completion, letter):
    assert exact.chosen_letter(completion) == letter
    assert exact.grade_choice(completion, {"answer": "B"}) == (letter == "B")
    assert exact.grade_choice(completion, {"answer": 1}) == (letter == "B")


def test_the_text_of_one_choice_is_its_letter():
    example = {"answer": "B", "choices": ["London", "Paris", "Rome"]}
    assert exact.grade_choice("<answer>paris.</answer>", example)
    assert not exact.grade_choice("<answer>Rome</answer>", example)
    assert not exact.grade_choice("<answer>Paris</answer>", {"answer": "B", "choices": ["Paris", "Paris"]})
    assert exact.grade_choice("The correct answer is a metal.", {"answer": "B", "choices": ["a gas", "a metal"]})
    assert not exact.grade_choice("The correct answer is a metal.", {"answer": "A", "choices": ["a gas", "a metal"]})


@pytest.mark.parametrize(
    ("gold", "found", "share"),
    [
        ("the Eiffel Tower", "Eiffel tower", 1.0),
        ("1,000", "1000", 1.0),
        ("3.0 yards", "3 yards", 1.0),
        ("3 yards", "4 yards", 0.0),
        ("Tom Brady", "Brady", 2 / 3),
        ("Tom Brady", "Manning", 0.0),
        ("well-known", "well known", 1.0),
    ],
)
def test_f1(gold, found, share):
    assert exact.f1(gold, found) == pytest.approx(share)
    assert exact.best_f1(f"<answer>{found}</answer>", {"answer": ["nothing else", gold]}) == pytest.approx(share)
    assert exact.grade_exact(f"<answer>{found}</answer>", {"answer": gold}) == (share == 1.0)


# One response that follows and one that does not, by instruction.
PAIRS = {
    "change_case:capital_word_frequency": (
        {"capital_relation": "at least", "capital_frequency": 2}, "NO WAY", "NO way"
    ),
    "change_case:english_capital": ({}, "ALL OF IT.", "All of it."),
    "change_case:english_lowercase": ({}, "all of it.", "All of it."),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say hello."}, "say hello. Hello!", "Hello! Say hello."),
    "combination:two_responses": ({}, "one ****** two", "one ****** one"),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[name] and [city]", "[name]"),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "Hello.\nP.S. bye", "Hello. bye"),
    "detectable_format:constrained_response": ({}, "My answer is yes.", "Yes."),
    "detectable_format:json_format": ({}, '```json\n{"a": [1]}\n```', '{"a": }'),
    "detectable_format:multiple_sections": (
        {"section_spliter": "SECTION", "num_sections": 2}, "SECTION 1\na\nSECTION 2\nb", "SECTION 1\na"
    ),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* one\n- two", "* one\n* two\n* three"),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*one* and **two**", "*one* and two"),
    "detectable_format:title": ({}, "<<A title>>\ntext", "A title\n<< >>"),
    "keywords:existence": ({"keywords": ["rock", "roll"]}, "Rock and rolling", "rock only"),
    "keywords:forbidden_words": ({"forbidden_words": ["rock"]}, "a rocket", "a Rock."),
    "keywords:frequency": ({"relation": "less than", "keyword": "war", "frequency": 2}, "war", "war and War"),
    "keywords:letter_frequency": ({"let_relation": "at least", "letter": "!", "let_frequency": 2}, "a! b!", "a!"),
    "language:response_language": ({"language": "hi"}, "यह एक वाक्य है", "This is a sentence"),
    "length_constraints:nth_paragraph_first_word": (
        {"first_word": "second", "num_paragraphs": 2, "nth_paragraph": 2}, "One.\n\nSecond, two.", "One.\n\nTwo second."
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "one\n***\ntwo", "one\n\ntwo"),
    "length_constraints:number_sentences": (
        {"relation": "less than", "num_sentences": 3}, "Mr. A has 3.5 apples. He ate one!", "One. Two. Three."
    ),
    "length_constraints:number_words": ({"relation": "at least", "num_words": 3}, "It's a word", "two words"),
    "punctuation:no_comma": ({}, "none here", "one, here"),
    "startend:end_checker": ({"end_phrase": "Any questions?"}, 'Well. any questions?"', "Any questions? No."),
    "startend:quotation": ({}, '"all of it"', '"not all" of it'),
}  # fmt: skip


@pytest.mark.parametrize("name", instructions.CHECKS)
def test_an_instruction_is_checked(name):
    given, good, bad = PAIRS[name]
    example = {"id": "i1", "instruction_ids": [name], "kwargs": [{**given, "unused": None}]}
    instructions.check_example({**example, "kwargs": [given]})
    assert instructions.grade(f"<think>one, two</think> {good}", example)
    assert instructions.grade(f"<think>x</think> <answer>{good}</answer>", example)
    assert not instructions.grade(f"<think>x</think> {bad}", example)
    assert not instructions.grade("<think>x</think>", example)
    both = {"instruction_ids": [name, "combination:two_responses"], "kwargs": [given, {}]}
    assert instructions.followed_share("", bad, both) in (0.0, 0.5)


def test_every_record_of_ifeval_is_readable():
    path = SHARED / "ifeval.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    for row in rows:
        instructions.check_example(row)
        verdicts = instructions.followed(row["prompt"], row)
        assert len(verdicts) == len(row["instruction_ids"])
    assert {name for row in rows for name in row["instruction_ids"]} == set(instructions.CHECKS)


@pytest.mark.parametrize(
    ("grader", "wrong"),
    [
        ("choice", {"answer": None}),
        ("choice", {"answer": 7, "choices": ["a", "b"]}),
        ("choice", {"answer": "Z"}),
        ("choice", {"answer": "A", "choices": "ab"[0:0] or 5}),
        ("exact", {"answer": None}),
        ("exact", {"answer": [None]}),
        ("exact", {"answer": {"a": 1}}),
        ("instructions", {"instruction_ids": None}),
        ("instructions", {"instruction_ids": ["no:such"], "kwargs": [{}]}),
        ("instructions", {"instruction_ids": ["punctuation:no_comma"], "kwargs": None}),
        ("instructions", {"instruction_ids": ["keywords:existence"], "kwargs": [{"keywords": "rock"}]}),
        ("instructions", {"instruction_ids": ["length_constraints:number_words"], "kwargs": [{"num_words": 3}]}),
        ("code", {"answer": [None]}),
        ("math", {"answer": ["5"]}),
    ],
)
def test_a_wrong_record_is_named_when_data_is_loaded(grader, wrong):
    with pytest.raises(ValueError, match="example 'r7'"):
        check_examples([{"id": "r7", "grader": grader, **wrong}], ["accuracy"])


def test_length_and_repetition():
    limits = {"max_characters": 100, "soft_characters": 50}
    assert [length_penalty("", "x" * n, limits) for n in (0, 50, 75, 100, 1000)] == [0.0, 0.0, -0.5, -1.0, -1.0]
    fresh = " ".join(map(str, range(200)))
    assert repetition_penalty("", fresh, {}) == repetition_penalty("", "", {}) == 0.0
    assert repetition_penalty("", "again and " * 200, {}) < -0.9
    assert repetition_penalty("", "再来一次" * 200, {}) < -0.9
    assert repetition_penalty("", fresh + " " + fresh, {}) == pytest.approx(-0.5, abs=0.1)


def test_a_judge_is_kept_within_bounds():
    assert judged(lambda prompt, completion, example: len(completion))("", "abc", {}) == 1.0
    assert judged(lambda prompt, completion, example: -3)("", "abc", {}) == 0.0
    assert judged(lambda prompt, completion, example: 0.25)("", "abc", {}) == 0.25


@pytest.mark.parametrize(
    "text", ["", "\x00", "\ud800", "<think>" * 1000, "(" * 5000, "a " * 20_000, "我" * 20_000, "*" * 5000]
)
def test_no_reward_raises_or_hangs_on_strange_text(text):
    example = {
        "question": "q", "answer": "B", "grader": "choice", "instruction_ids": list(PAIRS),
        "kwargs": [given for given, _, _ in PAIRS.values()],
    }  # fmt: skip
    for name, reward in REWARDS.items():
        if name not in ("countdown", "code_share", "language_id"):
            assert isinstance(reward("", text, example), float), name
