r"""Grades the final answer of a mathematical completion against a reference.

R1's accuracy reward for mathematics (DeepSeek-R1, arXiv 2501.12948, section 2.2): answers are compared by rule, as
text, part by part where they are tuples, sets or lists, and by value. What cannot be decided counts as different: a
false accept teaches the policy a trick, a false reject only costs a sample.

What is equal: numbers of the same value however written (3.5, 7/2, 3\frac12, 350%), expressions that agree at random
points, lists and sets in any order, inequalities and the intervals they mean, equations up to a factor, an answer with
and without its name ("x = 5"), unit or number base. What is not: rounded numbers, tuples in another order, brackets
of another kind, another unit or base, a solved and an unsolved equation.
"""

import functools
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from r1jax.rewards import relations
from r1jax.rewards.calculator import CONSTANTS, MP, Unreadable, Value
from r1jax.rewards.children import KillablePool
from r1jax.rewards.expression import evaluate
from r1jax.rewards.final_answer import extract_answer
from r1jax.rewards.latex import Reading, read
from r1jax.rewards.structure import Parts, parts

__all__ = ["answer", "canonical", "check_example", "equivalent", "extract_answer", "grade", "grade_many"]

# Longer answers are only compared as text.
MAX_CHARACTERS = 800
MAX_NESTING = 3
MAX_PARTS = 40
# Letters are tried at this many random rational points: an identity holds at all, anything else fails at nearly all.
POINTS = 3
# Of the 60 digits that the calculator carries; the rest is left to its rounding.
TRUSTED_DIGITS = 45
# gcd and lcm of letters are those of different primes; factorials want small whole numbers.
_PRIMES = [p for p in range(1009, 4000) if all(p % d for d in range(2, 64))]
_OF_WHOLE = re.compile(r"!|binom")
_OF_PRIMES = re.compile(r"gcd|lcm")
_LETTER = re.compile("[A-Za-z]")
_OPTION = re.compile(r"\(?([A-J])[).:](.+)", re.DOTALL)

Values = tuple[Value, ...] | None


def _fold(body: str) -> str:
    """Case matters in a letter (a variable, a label) and in a command, not in a word; nor do braces around brackets."""
    if re.search(r"(?<![\\A-Za-z])[A-Za-z]{3}", body):
        return re.sub(r"\s+|(?<=[a-z]{2})-(?=[a-z]{2})", "", body.casefold())
    if "\\" in body or "{" in body:
        body = re.sub(r"\\frac\s*(\w)\s*(\w)", r"\\frac{\1}{\2}", body).replace("{(", "(").replace(")}", ")")
        return re.sub(r"\s+", "", body)
    return re.sub(r"(?<=\b[A-Za-z]) (?=[A-Za-z]\b)", "", body)


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
    draw = random.Random(f"{point}{name}{seed}")
    if _OF_PRIMES.search(seed):
        return Fraction(draw.choice(_PRIMES))
    if _OF_WHOLE.search(seed):
        return Fraction(draw.randint(2, 30))
    # Small, so that a high power stays within the calculator's bounds.
    return Fraction(draw.randint(-3000, 3000), 997)


@functools.lru_cache(maxsize=256)  # the items of two sets are compared each with each
def _values(seed: str, body: str, log_base: Value) -> Values:
    """The values of `body` at POINTS random points that follow from `seed`, None if it has none.

    The seed is made of both answers, so that no answer can be written for points known beforehand.
    """
    points = range(POINTS) if _LETTER.search(body) else [0]
    try:
        found = [evaluate(body, functools.partial(_letter, seed, point), log_base) for point in points]
    except Unreadable:
        return None
    return tuple(found) * (POINTS // len(found))


def _close(left: Value, right: Value) -> bool:
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left == right
    left, right = MP.convert(left), MP.convert(right)
    return abs(left - right) <= MP.mpf(10) ** -TRUSTED_DIGITS * max(abs(left), abs(right), MP.mpf(10) ** -8)


def _is_printed_double(body: str) -> bool:
    """True for a decimal of 16 or 17 significant digits, as Python prints 0.1 + 0.2."""
    return bool(re.fullmatch(r"-?\d*\.\d+", body)) and len(body.lstrip("-0.").replace(".", "")) in (16, 17)


def _same_value(gold: str, answer: str, seed: str) -> bool:
    # A bare \log is the natural or the decimal one; the two sides have to mean the same.
    bases = [CONSTANTS["e"], Fraction(10)] if "log" in seed else [CONSTANTS["e"]]
    for base in bases:
        gold_values, answer_values = _values(seed, gold, base), _values(seed, answer, base)
        if gold_values is None or answer_values is None:
            return False
        if _is_printed_double(gold) or _is_printed_double(answer):
            same = all(
                isinstance(g, Fraction) and isinstance(a, Fraction) and float(g) == float(a)
                for g, a in zip(gold_values, answer_values, strict=True)
            )
        else:
            same = all(map(_close, gold_values, answer_values))
        if same:
            return True
    return False


def _same_relation(gold: relations.Relation, answer: relations.Relation, seed: str) -> bool:
    """Equal if left minus right of the one is a constant times that of the other, of the right sign."""
    if relations.is_solved(gold) != relations.is_solved(answer):
        return False
    mirrored = answer.sign.translate(str.maketrans("<>≤≥", "><≥≤"))
    if gold.sign not in (answer.sign, mirrored):
        return False
    differences = [f"({side.left})-({side.right})" for side in (gold, answer)]
    gold_values, answer_values = (_values(seed, difference, CONSTANTS["e"]) for difference in differences)
    if not gold_values or not answer_values or 0 in gold_values or 0 in answer_values:
        return False
    ratios = [g / a for g, a in zip(gold_values, answer_values, strict=True)]
    if not all(_close(ratio, ratios[0]) for ratio in ratios[1:]):
        return False
    ratio = ratios[0] if isinstance(ratios[0], Fraction) else MP.mpc(ratios[0]).real
    return gold.sign in "=≠≡≈" or (gold.sign == answer.sign) == (ratio > 0)


def _same(gold: str, answer: str, seed: str, nesting: int = 0) -> bool:
    if _fold(gold) == _fold(answer):
        return True
    gold_interval, answer_interval = relations.intervals(gold), relations.intervals(answer)
    if gold_interval and answer_interval and gold_interval[0] != answer_interval[0]:
        return False
    gold, answer = (found[1] if found else body for found, body in [(gold_interval, gold), (answer_interval, answer)])
    gold_relation, answer_relation = relations.relation(gold), relations.relation(answer)
    if gold_relation and answer_relation and _same_relation(gold_relation, answer_relation, seed):
        return True
    equal = functools.partial(_same_value, seed=seed)
    (gold_name, gold), (answer_name, answer) = relations.unnamed(gold, equal), relations.unnamed(answer, equal)
    if gold_name and answer_name and _fold(gold_name) != _fold(answer_name):
        return False
    gold_relation, answer_relation = relations.relation(gold), relations.relation(answer)
    if gold_relation or answer_relation:
        return bool(gold_relation and answer_relation) and _same_relation(gold_relation, answer_relation, seed)
    gold_parts, answer_parts = parts(gold), parts(answer)
    if gold_parts or answer_parts:
        gold_parts, answer_parts = gold_parts or Parts("", [gold]), answer_parts or Parts("", [answer])
        if nesting == MAX_NESTING or gold_parts.kind != answer_parts.kind:
            return False
        same = functools.partial(_same_part, nesting=nesting + 1)
        return _same_parts(gold_parts, answer_parts, same)
    return _fold(gold) == _fold(answer) or _same_value(gold, answer, seed)


def _same_part(gold: str, answer: str, nesting: int) -> bool:
    return gold == answer or _same_readings(read(gold), read(answer), nesting)


def _same_parts(gold: Parts, answer: Parts, same: Callable[[str, str], bool]) -> bool:
    if max(len(gold.items), len(answer.items)) > MAX_PARTS:
        return gold.items == answer.items
    if gold.kind not in ("", "∪"):
        return len(gold.items) == len(answer.items) and all(map(same, gold.items, answer.items))
    if gold.distinct or answer.distinct:
        return all(any(same(g, a) for a in answer.items) for g in gold.items) and all(
            any(same(g, a) for g in gold.items) for a in answer.items
        )
    remaining = list(answer.items)
    for item in gold.items:
        match = next((i for i, other in enumerate(remaining) if same(item, other)), None)
        if match is None:
            return False
        del remaining[match]
    return not remaining


def _same_option(gold: str, answer: str) -> bool:
    """True if one is a letter of multiple choice and the other that letter with its text, as in "(B) 12"."""
    letter, longer = sorted([gold, answer], key=len)
    match = _OPTION.fullmatch(longer) if len(letter) == 1 else None
    return bool(match) and match[1] == letter and not re.search(r"\b[A-J]\b", match[2])


def _same_readings(gold: Reading, answer: Reading, nesting: int = 0) -> bool:
    if not (gold.body and answer.body) or (gold.unit and answer.unit and gold.unit != answer.unit):
        return False
    seed = f"{gold.body}\0{answer.body}"
    if _same(gold.body, answer.body, seed, nesting) or _same_option(gold.body, answer.body):
        return True
    if (gold.unit == "%") == (answer.unit == "%"):
        return False
    # 28% may be given as 28, its unit being understood, or as 0.28.
    percentage, plain = (gold, answer) if gold.unit == "%" else (answer, gold)
    return _same(f"({percentage.body})/100", plain.body, seed, nesting)


def equivalent(gold: str, answer: str) -> bool:
    r"""True if `answer` says the same as the reference `gold`, as the module says; never raises, never runs long."""
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
    return _canonical(answer, 0)


def _canonical(answer: str, nesting: int) -> str:
    body = read(answer).body
    if found := relations.intervals(body):
        body = found[1]
    _, body = relations.unnamed(body, lambda one, other: _exact(one) is not None and _exact(one) == _exact(other))
    if nesting < MAX_NESTING and (found := parts(body)):
        forms = [_canonical(part, nesting + 1) for part in found.items]
        if found.kind in ("", "∪"):
            forms = sorted(set(forms) if found.distinct else forms)
        return found.kind[:1] + (found.kind if found.kind == "∪" else ",").join(forms) + found.kind[1:]
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
