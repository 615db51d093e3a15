"""The outer form of a completion: where the thinking ends, what stands in the answer, and the format reward.

R1-Zero's template and its format reward (DeepSeek-R1, arXiv 2501.12948, section 2.2 and table 1). Every function takes
time linear in the text, so a hostile completion cannot make it slow as a backtracking pattern would.
"""

from collections.abc import Mapping
from typing import Any

THINK, THINK_END, ANSWER, ANSWER_END = TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def with_forced_thought(prompt: str, completion: str) -> str:
    """The completion with the `<think>` that the prompt already opened for it, as the report's evaluation does."""
    return THINK + completion if prompt.rstrip().endswith(THINK) else completion


def after_thinking(completion: str) -> str:
    """The text behind the last thought, the whole text if there is none, "" while a thought is still open."""
    end = completion.rfind(THINK_END)
    if completion.rfind(THINK) > end:
        return ""
    return completion if end < 0 else completion[end + len(THINK_END) :]


def answer_span(text: str) -> tuple[int, int] | None:
    """Start and end of what the last closed `<answer>` block of `text` contains; None if there is no such block."""
    end = text.rfind(ANSWER_END)
    start = text.rfind(ANSWER, 0, max(end, 0))
    return None if start < 0 else (start + len(ANSWER), end)


def format_reward(prompt: str, completion: str, example: Mapping[str, Any], **context: Any) -> float:
    """1.0 if the whole completion is one thought and then one answer, neither empty, and nothing else; otherwise 0.0.

    White space is allowed around the two blocks. A second block, a nested one or any text outside gives 0.0.
    """
    text = with_forced_thought(prompt, completion).strip()
    if any(text.count(tag) != 1 for tag in TAGS) or not (text.startswith(THINK) and text.endswith(ANSWER_END)):
        return 0.0
    thought, _, rest = text.removeprefix(THINK).partition(THINK_END)
    gap, _, answer = rest.removesuffix(ANSWER_END).partition(ANSWER)
    # Were <answer> inside the thought, nothing would be left for the answer.
    return float(bool(thought.strip()) and not gap.strip() and bool(answer.strip()))
