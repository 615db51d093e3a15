"""Grades Countdown answers: an expression in + - * that uses exactly the given numbers and reaches the target.

The game as TinyZero (Pan et al., 2025) made it a task for R1-Zero in the small. An answer is read by a small
recursive-descent parser of bounded input and never evaluated as code. Its normal form, two expressions being the same
when they differ only in the order and grouping of sums and products, is what a majority vote counts.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from r1jax.rewards.form import after_thinking, answer_span

MAX_CHARACTERS = 500
MAX_DIGITS = 12
MAX_DEPTH = 50

_SPELLINGS = str.maketrans({"×": "*", "·": "*", "⋅": "*", "−": "-", "–": "-"})
_TOKEN = re.compile(r"\s*(?:([0-9]+)|([-+*()]))\s*")


class Expression(NamedTuple):
    """What was read: its value, the numbers used in ascending order, and the normal form."""

    value: int
    numbers: tuple[int, ...]
    normal_form: str


class _Term(NamedTuple):
    """A number, product or sum while it is read; `parts` are what a product multiplies or a sum adds (with a sign)."""

    kind: str  # "number", "product" or "sum"
    value: int
    numbers: tuple[int, ...]
    parts: tuple[tuple[int, "_Term"], ...]

    def normal_form(self) -> str:
        if self.kind == "number":
            return str(self.value)
        if self.kind == "product":
            # Shorter numbers first, then sums in parentheses; a sum's normal form can stand in a product only so.
            factors = [f"({f.normal_form()})" if f.kind == "sum" else f.normal_form() for _, f in self.parts]
            return "*".join(sorted(factors, key=lambda s: (s.startswith("("), len(s), s)))
        signed = [(sign < 0, term.normal_form()) for sign, term in self.parts]
        ordered = sorted(signed, key=lambda s: (s[0], len(s[1]), s[1]))
        return "".join(("-" if minus else "+") + form for minus, form in ordered).removeprefix("+")


def _number(value: int) -> _Term:
    return _Term("number", value, (value,), ())


def _product(factors: list[_Term]) -> _Term:
    if len(factors) == 1:
        return factors[0]
    value, parts = 1, []
    for factor in factors:
        value *= factor.value
        parts += factor.parts if factor.kind == "product" else [(1, factor)]
    return _Term("product", value, sum((f.numbers for f in factors), ()), tuple(parts))


def _sum(terms: list[tuple[int, _Term]]) -> _Term:
    if len(terms) == 1:
        return terms[0][1]
    value, parts = 0, []
    for sign, term in terms:
        value += sign * term.value
        # a - (b - c) is a - b + c: the sign of a difference reaches its parts.
        parts += [(sign * s, t) for s, t in term.parts] if term.kind == "sum" else [(sign, term)]
    return _Term("sum", value, sum((t.numbers for _, t in terms), ()), tuple(parts))


class _Unreadable(Exception):
    """The text is not an expression of the game."""


class _Parser:
    """sum = product {+- product}; product = factor {* factor}; factor = number | ( sum ). No sign before a number."""

    def __init__(self, text: str) -> None:
        self.tokens, position = [], 0
        while position < len(text):
            if not (match := _TOKEN.match(text, position)) or len(match[1] or "") > MAX_DIGITS:
                raise _Unreadable
            self.tokens.append(match[1] or match[2])
            position = match.end()
        self.tokens.append("")
        self.at = 0

    def accept(self, symbols: str) -> str:
        """The next token if it is one of `symbols`, else ""."""
        token = self.tokens[self.at]
        if token and token in symbols:
            self.at += 1
            return token
        return ""

    def whole(self) -> _Term:
        term = self.sum(0)
        if self.tokens[self.at]:
            raise _Unreadable
        return term

    def sum(self, depth: int) -> _Term:
        terms = [(1, self.product(depth))]
        while operator := self.accept("+-"):
            terms.append((1 if operator == "+" else -1, self.product(depth)))
        return _sum(terms)

    def product(self, depth: int) -> _Term:
        factors = [self.factor(depth)]
        while self.accept("*"):
            factors.append(self.factor(depth))
        return _product(factors)

    def factor(self, depth: int) -> _Term:
        if self.accept("("):
            if depth == MAX_DEPTH:
                raise _Unreadable
            term = self.sum(depth + 1)
            if not self.accept(")"):
                raise _Unreadable
            return term
        if not self.tokens[self.at].isdigit():
            raise _Unreadable
        self.at += 1
        return _number(int(self.tokens[self.at - 1]))


@functools.lru_cache(maxsize=256)  # the grade and the canonical answer ask for the same text
def read(text: str) -> Expression | None:
    """The expression that `text` writes, None if it is none of this game.

    × and · count as `*`, the typographic minus as `-`. A tail `= number` may follow; one that is not the value of the
    expression stays in the normal form, so that a false equation never votes with a true one.
    """
    text = text.translate(_SPELLINGS).strip()
    if len(text) > MAX_CHARACTERS:
        return None
    left, equals, tail = text.partition("=")
    tail = tail.strip()
    if equals and not (re.fullmatch("-?[0-9]+", tail) and len(tail) <= MAX_DIGITS):
        return None
    try:
        term = _Parser(left).whole()
    except _Unreadable:
        return None
    false_tail = f"={int(tail)}" if equals and int(tail) != term.value else ""
    return Expression(term.value, tuple(sorted(term.numbers)), term.normal_form() + false_tail)


def _final(completion: str) -> Expression | None:
    text = after_thinking(completion)
    span = answer_span(text)
    return read(text[slice(*span)]) if span else None


def grade(completion: str, example: Mapping[str, Any]) -> bool:
    """True if the `<answer>` uses exactly the numbers of the example's gold and reaches its target."""
    gold, found = example["answer"], _final(completion)
    return (
        found is not None
        and "=" not in found.normal_form
        and found.value == gold["target"]
        and found.numbers == tuple(sorted(gold["numbers"]))
    )


def answer(completion: str, example: Mapping[str, Any]) -> str | None:
    """The normal form of the `<answer>` for voting, None if it cannot be read. Equal answers have equal grades."""
    found = _final(completion)
    return found.normal_form if found else None


def check_example(example: Mapping[str, Any]) -> None:
    """Raises ValueError that names the record and the field if the gold is not {"numbers": [ints], "target": int}."""

    def is_int(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    record, gold = f"example {example.get('id')!r}", example.get("answer")
    if not isinstance(gold, Mapping):
        raise ValueError(
            f"{record}: field 'answer' is {gold!r}, but the countdown grader needs "
            '{"numbers": [3, 5, 7], "target": 26}'
        )
    numbers, target = gold.get("numbers"), gold.get("target")
    if not (isinstance(numbers, list) and numbers and all(is_int(n) and n >= 0 for n in numbers)):
        raise ValueError(f"{record}: field 'answer.numbers' is {numbers!r}, wanted a list of non-negative integers")
    if not is_int(target):
        raise ValueError(f"{record}: field 'answer.target' is {target!r}, wanted an integer")
