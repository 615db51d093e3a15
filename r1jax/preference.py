"""Preferences: pairs judged several times, balanced by length; rows for a reward model; its scores as a reward.

R1 report, section 2.3.4 and its supplement: helpfulness is learned from pairs and reads the summary only, so that it
does not interfere with the thought; safety is learned from single responses and reads all of them.
"""

import collections
import math
import numbers
import random
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from r1jax import letters
from r1jax.endpoint import open_asked, open_function
from r1jax.rewards.form import ANSWER, ANSWER_END
from r1jax.rewards.worth import reply_of
from r1jax.rollout import Group, Sample
from r1jax.text import Tokenizer, encode_prompt
from r1jax.types import Example

# By how much the first of two replies is better than the second (negative: worse); None: the judge said nothing.
Judge = Callable[[Example, str, str], float | None]

# The rule that judges letters stands for a model: it errs, and likes what it reads first.
NOISE, FIRST = 0.1, 0.05
INSTRUCTION = (
    "Two replies to the same instruction follow. Rate each from 1 to 10 for how helpful it is. "
    'Answer with two numbers and nothing else, as "7 4".\n\nInstruction: {question}\n\nReply 1: {a}\n\nReply 2: {b}'
)


def judge_letters(example: Example, first: str, second: str) -> float | None:
    """The packaged judge: the rule for letters, with an error of its own for each pair and a liking for the first."""
    letter = letters.Letter(**example["answer"])
    noise = random.Random(f"{example['id']} {first} {second}").gauss(0.0, NOISE)
    return letters.worth(first, letter) - letters.worth(second, letter) + FIRST + noise


def open_judge(name: str, timeout_s: float, tries: int, key: str = "config.preference.judge") -> Judge:
    """What config.preference.judge, or another `key`, names.

    Raises:
        ValueError: there is no such judge.
    """
    if name == "letters":
        return judge_letters
    return open_asked(name, key, _both, _difference, timeout_s, tries)


def _both(example: Example, first: str, second: str) -> str:
    return INSTRUCTION.format(question=example["question"], a=first, b=second)


def _difference(said: str, *_: object) -> float | None:
    """Of the two ratings from 1 to 10 in what a judge said: "7 4", "7/10, 4/10", "Reply 1: 7, reply 2: 4"."""
    plain = re.sub(r"(?i)\breply\s*\d|(?<=\d)\s*/\s*10\b", "", said)
    ratings = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", plain)]
    if len(ratings) != 2 or not all(1 <= rating <= 10 for rating in ratings):
        return None
    return ratings[0] - ratings[1]


def open_safety(name: str) -> Callable[[Example, str], bool | None]:
    """What config.preference.safety names: whether a response to an example is safe; None: no idea.

    Raises:
        ValueError: there is no such function.
    """
    if name == "letters":
        return lambda example, response: letters.is_safe(response)
    return open_function(name, "config.preference.safety")


def judged_gap(judge: Judge, example: Example, a: str, b: str, times: int, rng: random.Random) -> float | None:
    """Mean over several judgements in random order of how much better `a` is; None if the judge was ever silent."""
    gaps = []
    for _ in range(times):
        swapped = rng.random() < 0.5
        gap = judge(example, b, a) if swapped else judge(example, a, b)
        if not isinstance(gap, numbers.Real) or not math.isfinite(gap):
            return None
        gaps.append(-gap if swapped else gap)
    return statistics.fmean(gaps)


def pairs_of(group: Group, judge: Judge, times: int, margin: float) -> tuple[list[dict], collections.Counter[str]]:
    """Pairs of neighbouring samples of a group that differ clearly: question, chosen, rejected, gap."""
    counts, pairs = collections.Counter(), []
    example = group[0].example
    rng = random.Random(f"order {example['id']}")
    for left, right in zip(group[0::2], group[1::2], strict=False):
        a, b = reply_of(left.text), reply_of(right.text)
        counts["pairs"] += 1
        if a == b or not (a and b):
            counts["alike or empty"] += 1
            continue
        gap = judged_gap(judge, example, a, b, times, rng)
        if gap is None:
            counts["judge failed"] += 1
        elif abs(gap) <= margin:
            counts["within the margin"] += 1
        else:
            chosen, rejected = (a, b) if gap > 0 else (b, a)
            pairs.append(
                {"question": example["question"], "chosen": chosen, "rejected": rejected, "gap": round(abs(gap), 4)}
            )
    return pairs, counts


def balance(pairs: Sequence[dict[str, Any]], length: Callable[[str], int], seed: int) -> list[dict[str, Any]]:
    """As many pairs whose chosen reply is the longer one as pairs where it is the shorter one; the rest is left out.

    Args:
        length: of a reply, in the unit that the reward model sees: tokens.
    """
    more = [length(p["chosen"]) - length(p["rejected"]) for p in pairs]
    longer, shorter, alike = (
        [p for p, m in zip(pairs, more, strict=True) if sign(m)]
        for sign in (lambda m: m > 0, lambda m: m < 0, lambda m: m == 0)
    )
    rng, n = random.Random(f"balance {seed}"), min(len(longer), len(shorter))
    kept = rng.sample(longer, n) + rng.sample(shorter, n) + alike
    return rng.sample(kept, len(kept))


def summary(reply: str) -> str:
    """A reply as the helpfulness model reads it: what stands in the answer, and nothing of the thought."""
    return f" {ANSWER}{reply}{ANSWER_END}"


def rows_of(
    texts: Sequence[tuple[str, str]], tokenizer: Tokenizer, template: str, length: int, labels: Sequence[float] = ()
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """One row [N, T] for each question and response, and which of them fit; those that do not are empty rows."""
    n = len(texts)
    tokens, segments = np.zeros((n, length), np.int32), np.zeros((n, length), np.int32)
    is_last = np.zeros((n, length), bool)
    for i, (question, text) in enumerate(texts):
        ids = [*encode_prompt(tokenizer, template, question)[1], *tokenizer.encode(text), tokenizer.eos_id]
        if len(ids) <= length:
            tokens[i, : len(ids)], segments[i, : len(ids)], is_last[i, len(ids) - 1] = ids, 1, True
    rows = {
        "tokens": tokens,
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape).copy(),
        "segments": segments,
        "parents": segments,
        "is_last": is_last,
    }
    if len(labels):
        rows["label"] = np.where(is_last, np.asarray(labels, np.float32)[:, None], 0.0).astype(np.float32)
    return rows, is_last.any(1)


# Scores of (question, response) pairs, higher is better, each between 0 and 1.
Scorer = Callable[[Sequence[tuple[str, str]]], np.ndarray]


def with_preference(groups: Sequence[Group], scorers: dict[str, Scorer], weight: float) -> list[Group]:
    """The groups with the reward models' scores added to the rewards of general instructions (grader "judged").

    Helpfulness reads the summary, safety the whole response. Other samples get 0.0, so that all have the same names.
    """
    asked = [s for group in groups for s in group if s.example["grader"] == "judged"]
    read = {
        "helpful": [(s.example["question"], summary(reply_of(s.text))) for s in asked],
        "safe": [(s.example["question"], s.text) for s in asked],
    }
    found = {name: iter(scorer(read[name])) if asked else iter(()) for name, scorer in scorers.items()}

    def one(s: Sample) -> Sample:
        is_asked = s.example["grader"] == "judged"
        scores = {name: float(next(values)) if is_asked else 0.0 for name, values in found.items()}
        reward = s.graded.reward + weight * sum(scores.values())
        return replace(s, graded=replace(s.graded, rewards={**s.graded.rewards, **scores}, reward=reward))

    return [[one(s) for s in group] for group in groups]


def is_hacked(evals: Sequence[dict[str, Any]], drop: float) -> bool:
    """Whether the reward models' score has risen since the first evaluation while the rules' accuracy fell by `drop`.

    Accuracy is compared with the best so far: a policy that earns preference at the cost of what can be checked.
    """
    if len(evals) < 2:
        return False
    best = max(one["pass_at_1"] for one in evals[:-1])
    return evals[-1]["preference"] > evals[0]["preference"] and evals[-1]["pass_at_1"] < best - drop
