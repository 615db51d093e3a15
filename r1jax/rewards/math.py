"""Grades the final answer of a mathematical completion against a reference.

R1's accuracy reward for mathematics: the final answer stands in a box (DeepSeek-R1, arXiv 2501.12948, section 2.2) or
in `<answer>` tags and is compared by rule: as text, item by item where it is a tuple, set or list, and by value. What
cannot be decided counts as different: a false accept teaches the policy a trick, a false reject only costs a sample.
"""

import functools
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from r1jax.rewards.calculator import MP, Unreadable, Value, evaluate
from r1jax.rewards.children import KillablePool
from r1jax.rewards.form import after_thinking, answer_span
from r1jax.rewards.latex import Reading, items, read

# Longer answers are only compared as text.
MAX_CHARACTERS = 400
MAX_NESTING = 2
# Letters are tried at this many random rational points: an identity holds at all, anything else fails at nearly all.
POINTS = 3
# Of the 60 digits that the calculator carries; the rest is left to its rounding.
TRUSTED_DIGITS = 45

_NAMED = re.compile(r"([A-Za-z])\s*=\s*([^=]+)", re.DOTALL)
_BRACES = re.compile(r"(\\f?boxed\s*\{)|\\.|\{|\}", re.DOTALL)
Values = tuple[Value, ...] | None


def extract_answer(completion: str) -> str | None:
    r"""The last \boxed{...} or `<answer>` text behind the thinking, None without any.

    A box inside the tags wins over the tags; a box or block that is not closed is none.
    """
    text = after_thinking(completion)
    span = answer_span(text)
    unclosed: list[int | None] = []
    box: tuple[int, int] | None = None
    for match in _BRACES.finditer(text):
        if match[1] or match[0] == "{":
            unclosed.append(match.end() if match[1] else None)
        elif match[0] == "}" and unclosed and (start := unclosed.pop()) and (box is None or start > box[0]):
            box = (start, match.start())
    if box and (not span or box[0] > span[0]):
        span = box
    return text[slice(*span)].strip() if span else None


def _fold(body: str) -> str:
    """Case matters in a letter (a variable, a label) and in a command, not in a word."""
    return body.casefold() if re.search(r"(?<![\\A-Za-z])[A-Za-z]{3}", body) else body


def _unnamed(body: str) -> tuple[str, str]:
    """The name and the rest of "x = 5"; the name is "" where there is none."""
    match = _NAMED.fullmatch(body)
    return (match[1], match[2].strip()) if match else ("", body)


def _no_letter(name: str) -> Fraction:
    raise Unreadable


def _exact(body: str) -> Fraction | None:
    """The value of a rational expression without letters, else None."""
    try:
        value = evaluate(body, _no_letter)
    except Unreadable:
        return None
    return value if isinstance(value, Fraction) else None


def _letter(seed: str, point: int, name: str) -> Fraction:
    # Small, so that a high power stays within the calculator's bounds.
    return Fraction(random.Random(f"{point}{name}{seed}").randint(-3000, 3000), 997)


@functools.lru_cache(maxsize=256)  # the items of two sets are compared each with each
def _values(seed: str, body: str) -> Values:
    """The values of `body` at POINTS random points that follow from `seed`, None if it has none.

    The seed is made of both answers, so that no answer can be written for points known beforehand.
    """
    points = range(POINTS) if re.search("[A-Za-z]", body) else [0]
    try:
        found = [evaluate(body, functools.partial(_letter, seed, point)) for point in points]
    except Unreadable:
        return None
    return tuple(found) * (POINTS // len(found))


def _close(left: Value, right: Value) -> bool:
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left == right
    left, right = MP.convert(left), MP.convert(right)
    tolerance = MP.mpf(10) ** -TRUSTED_DIGITS
    return abs(left - right) <= tolerance * max(abs(left), abs(right), tolerance)


def _is_printed_double(body: str) -> bool:
    """True for a decimal of 16 or 17 significant digits, as Python prints 0.1 + 0.2."""
    return bool(re.fullmatch(r"-?\d*\.\d+", body)) and len(body.lstrip("-0.").replace(".", "")) in (16, 17)


def _same(gold: str, answer: str, seed: str, nesting: int = 0) -> bool:
    if _fold(gold) == _fold(answer):
        return True
    (gold_name, gold), (answer_name, answer) = _unnamed(gold), _unnamed(answer)
    if gold_name and answer_name and gold_name != answer_name:
        return False
    gold_items, answer_items = items(gold), items(answer)
    if gold_items or answer_items:
        if nesting == MAX_NESTING or not gold_items or not answer_items or gold_items[0] != answer_items[0]:
            return False
        same = functools.partial(_same, seed=seed, nesting=nesting + 1)
        return _same_items(*gold_items, answer_items[1], same)
    gold_values, answer_values = _values(seed, gold), _values(seed, answer)
    if gold_values is None or answer_values is None:
        return False
    if _is_printed_double(gold) or _is_printed_double(answer):
        return all(
            isinstance(g, Fraction) and isinstance(a, Fraction) and float(g) == float(a)
            for g, a in zip(gold_values, answer_values, strict=True)
        )
    return all(map(_close, gold_values, answer_values))


def _same_items(brackets: str, gold: list[str], answer: list[str], same: Callable[[str, str], bool]) -> bool:
    if len(gold) != len(answer):
        return False
    if brackets:
        return all(map(same, gold, answer))
    remaining = list(answer)
    for item in gold:
        match = next((i for i, other in enumerate(remaining) if same(item, other)), None)
        if match is None:
            return False
        del remaining[match]
    return True


def _same_readings(gold: Reading, answer: Reading) -> bool:
    if not (gold.body and answer.body) or (gold.unit and answer.unit and gold.unit != answer.unit):
        return False
    seed = f"{gold.body}\0{answer.body}"
    if _same(gold.body, answer.body, seed):
        return True
    if (gold.unit == "%") == (answer.unit == "%"):
        return False
    # 28% may be given as 28, its unit being understood, or as 0.28.
    percentage, plain = (gold, answer) if gold.unit == "%" else (answer, gold)
    return _same(f"({percentage.body})/100", plain.body, seed)


def equivalent(gold: str, answer: str) -> bool:
    r"""True if `answer` says the same as the reference `gold`; never raises, never runs long.

    Numbers are equal in value (3.5, 7/2, \frac72, 3\frac12), not when rounded; lists and sets in any order; units may
    be left out but must not differ; 28% equals 28 and 0.28.
    """
    if gold.strip() == answer.strip():
        return True
    if max(len(gold), len(answer)) > MAX_CHARACTERS:
        return False
    try:
        return _same_readings(read(gold), read(answer))
    except Exception:  # the contract: whatever a strange text sets off, it is not the reference
        return False


def canonical(answer: str) -> str:
    """One spelling for the answers that a majority vote should count as one; units are left out."""
    if len(answer) > MAX_CHARACTERS:
        return answer
    _, body = _unnamed(read(answer).body)
    if found := items(body):
        brackets, parts = found
        forms = [canonical(part) for part in parts]
        return brackets[:1] + ",".join(forms if brackets else sorted(forms)) + brackets[1:]
    value = _exact(body)
    return _fold(body) if value is None else str(value)


def grade(completion: str, example: Mapping[str, Any]) -> bool:
    """True if the final answer of the completion is equivalent to the gold of the example."""
    found = extract_answer(completion)
    return found is not None and equivalent(str(example["answer"]), found)


def answer(completion: str, example: Mapping[str, Any]) -> str | None:
    """The final answer in its canonical spelling, None if the completion has none."""
    found = extract_answer(completion)
    return (canonical(found) or None) if found else None


def check_example(example: Mapping[str, Any]) -> None:
    """Raises ValueError that names the record and the field if the gold is neither text nor a number."""
    gold = example.get("answer")
    if isinstance(gold, bool) or not isinstance(gold, str | int | float) or not str(gold).strip():
        raise ValueError(
            f"example {example.get('id')!r}: field 'answer' is {gold!r}, but the math grader needs a text or a number"
        )


def pair_grader() -> Callable[[tuple[str, str]], bool]:
    """What a child process of `grade_many` runs for each pair."""
    return lambda pair: equivalent(*pair)


def grade_many(pairs: Sequence[tuple[str, str]], workers: int | None = None, timeout_s: float = 5.0) -> list[bool]:
    """`equivalent` for every (gold, answer), in `workers` child processes (default: one for each core).

    A pair that takes longer than `timeout_s` is False.
    """
    if not pairs:
        return []
    workers = workers or min(len(pairs), len(os.sched_getaffinity(0)))
    with KillablePool("r1jax.rewards.math:pair_grader", (), workers, timeout_s) as pool:
        for ticket, pair in enumerate(pairs):
            pool.submit(ticket, pair)
        return [outcome.fate == "" and outcome.value for outcome in pool.drain()]
