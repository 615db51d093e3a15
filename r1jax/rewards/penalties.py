"""Rewards that are subtracted: length and repetition. And the answer that only a judge can grade.

The length penalty is the soft overlong punishment of DAPO (arXiv 2503.14476, section 3.4), the repetition penalty the
share of n-grams that were there before (Yeo et al., 2025, arXiv 2502.03373).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

# Where an example says nothing. Characters, because a reward sees text.
MAX_CHARACTERS = 40_000
SOFT_CHARACTERS = 10_000
NGRAM_WORDS = 20

Judge = Callable[[str, str, Mapping[str, Any]], float]  # prompt, completion, example to 0..1


def length_penalty(prompt: str, completion: str, example: Mapping[str, Any], **context: Any) -> float:
    """0.0 up to the example's `max_characters` less `soft_characters`, then falling evenly to -1.0 at the maximum."""
    most, soft = example.get("max_characters", MAX_CHARACTERS), example.get("soft_characters", SOFT_CHARACTERS)
    return -min(max(len(completion) - (most - soft), 0) / soft, 1.0)


def repetition_penalty(prompt: str, completion: str, example: Mapping[str, Any], **context: Any) -> float:
    """Minus the share of runs of NGRAM_WORDS words that stand in the completion before; -1.0 to 0.0.

    Where words are not spaced (Chinese), a run is of as many characters.
    """
    words: Any = completion.split()
    if len(completion) > 12 * max(len(words), 1):
        words = completion
    n = len(words) - NGRAM_WORDS + 1
    if n <= 0:
        return 0.0
    return len({tuple(words[i : i + NGRAM_WORDS]) for i in range(n)}) / n - 1.0


def judged(judge: Judge) -> Callable[..., float]:
    """A reward that asks `judge`, a preference model or a rule of the user's, and keeps what it says within 0 and 1."""

    @functools.wraps(judge)
    def reward(prompt: str, completion: str, example: Mapping[str, Any], **context: Any) -> float:
        return min(max(float(judge(prompt, completion, example)), 0.0), 1.0)

    return reward
