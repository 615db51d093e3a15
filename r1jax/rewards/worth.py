"""What the rule for letters says of a completion: watched and evaluated by, never a reward of RL (r1jax/letters.py)."""

from collections.abc import Mapping
from typing import Any

from r1jax import letters
from r1jax.rewards.form import after_thinking, answer_span, with_forced_thought


def reply_of(completion: str) -> str:
    """What the addressee gets to read: the answer, or what stands behind the thought where none is marked."""
    text = after_thinking(completion)
    span = answer_span(text)
    return text[slice(*span)].strip() if span else text.strip()


def grade(completion: str, example: Mapping[str, Any]) -> float:
    """The worth of the reply in a completion."""
    return letters.worth(reply_of(completion), letters.Letter(**example["answer"]))


def worth(prompt: str, completion: str, example: Mapping[str, Any], **context: Any) -> float:
    """The worth of the letter, 0.0 to 1.0; 0.0 for other tasks."""
    if not str(example.get("id", "")).startswith(letters.ID):
        return 0.0
    return grade(with_forced_thought(prompt, completion), example)
