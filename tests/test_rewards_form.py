"""Laws of the format reward and of the answer span."""

import pytest

from r1jax.rewards.form import after_thinking, answer_span, format_reward

GOOD = "<think>3*7=21</think> <answer>3*7+5</answer>"


def reward(completion, prompt="User: q. Assistant:"):
    return format_reward(prompt, completion, {})


@pytest.mark.parametrize(
    "completion",
    [
        GOOD,
        f"\n  {GOOD}\n\n",
        GOOD.replace("> <", "><"),
        GOOD.replace("> <", ">\n\n<"),
        "<think>a < b, <b>bold</b>\n\nand more</think><answer>1 < 2</answer>",
    ],
)
def test_one_thought_and_one_answer_is_the_format(completion):
    assert reward(completion) == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "3*7+5",
        "<answer>3*7+5</answer>",
        "<think>3*7=21</think>",
        "<think></think> <answer>1</answer>",
        "<think> \n </think> <answer>1</answer>",
        "<think>a</think> <answer></answer>",
        "<think>a</think> <answer> </answer>",
        f"So: {GOOD}",
        f"{GOOD} Done.",
        GOOD.replace("> <", "> so <"),
        GOOD + GOOD,
        GOOD + " <answer>2</answer>",
        "<think>a</think> " + GOOD,
        "<think>a <think>b</think> <answer>1</answer>",
        "<think>a</think> <answer><answer>1</answer></answer>",
        "<think>a</think> <answer>1 <think>b</think></answer>",
        "<think>a <answer>1</think> 2</answer>",
        "<think>a <answer>1</answer></think>",
        "<answer>1</answer> <think>a</think>",
        "<think>a</answer> <answer>b</think>",
        "</think>a<think> <answer>1</answer>",
        GOOD.removesuffix("</answer>"),
        GOOD.replace("</think>", ""),
        GOOD.replace("think", "Think"),
    ],
)
def test_anything_else_is_not(completion):
    assert reward(completion) == 0.0


def test_a_thought_opened_by_the_prompt_counts():
    assert reward(GOOD.removeprefix("<think>"), prompt="User: q. Assistant: <think>\n") == 1.0
    assert reward(GOOD, prompt="User: q. Assistant: <think>\n") == 0.0


def test_only_what_follows_the_last_thought_is_outside_it():
    assert after_thinking("no thought") == "no thought"
    assert after_thinking("<think>a</think>b") == "b"
    assert after_thinking("a</think>b") == "b"
    assert after_thinking("<think>a</think>b<think>c</think>d") == "d"
    assert after_thinking("<think>a") == ""
    assert after_thinking("<think>a</think>b<think>c") == ""


def test_the_last_closed_answer_block_is_the_answer():
    def answer(text):
        span = answer_span(text)
        return text[slice(*span)] if span else None

    assert answer("<answer>1</answer><answer>2</answer>") == "2"
    assert answer("<answer>1</answer><answer>2") == "1"
    assert answer("<answer>1<answer>2</answer>") == "2"
    assert answer("1</answer>") is None
    assert answer("<answer>1") is None
    assert answer("") is None
