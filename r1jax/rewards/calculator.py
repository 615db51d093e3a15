"""Evaluates a short mathematical expression, plain or in LaTeX, in bounded time and without ever running it as code.

A recursive-descent calculator over a closed list of operations. Values are exact fractions as long as they can be and
60-digit numbers of mpmath (sympy's arithmetic) after that. Every operation is bounded in the size of its result,
so 9^9^9^9 is refused at once. sympy itself is not asked to simplify: that has no bound on time.
"""

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from mpmath import MPContext

MAX_CHARACTERS = 400
MAX_DEPTH = 40
MAX_BITS = 4096

# A context of our own: the precision of mpmath's global one belongs to the user.
MP = MPContext()
MP.dps = 60

Value = Any  # Fraction, mpf or mpc


class Unreadable(Exception):
    """The text is no expression of this calculator, or one whose value is undefined or too large."""


def _numeric(value: Value) -> Any:
    return MP.mpc(MP.convert(value)) if isinstance(value, Fraction) else MP.mpc(value)


def _bits(value: Value) -> int:
    if isinstance(value, Fraction):
        return max(value.numerator.bit_length(), value.denominator.bit_length())
    return max(abs(MP.mag(value)), 1) if value else 1


def _bounded(value: Value) -> Value:
    if not (isinstance(value, Fraction) or MP.isfinite(value)) or _bits(value) > MAX_BITS:
        raise Unreadable
    return value


def _combine(left: Value, right: Value, operation: Callable[[Value, Value], Value]) -> Value:
    if not (isinstance(left, Fraction) and isinstance(right, Fraction)):
        left, right = _numeric(left), _numeric(right)
    return _bounded(operation(left, right))


def _divide(left: Value, right: Value) -> Value:
    if right == 0:
        raise Unreadable
    return _combine(left, right, lambda a, b: a / b)


def _power(base: Value, exponent: Value) -> Value:
    if base == 0 and not (isinstance(exponent, Fraction) and exponent > 0):
        raise Unreadable
    if abs(_numeric(exponent)) * _bits(base) > MAX_BITS:
        raise Unreadable
    if isinstance(exponent, Fraction) and exponent.denominator == 1:
        return _bounded(base ** int(exponent))
    return _bounded(MP.power(_numeric(base), _numeric(exponent)))


def _factorial(value: Value) -> Value:
    if not (isinstance(value, Fraction) and value.denominator == 1 and 0 <= value <= 200):
        raise Unreadable
    return Fraction(math.factorial(int(value)))


def _moderate(function: Callable[[Any], Any]) -> Callable[[Value], Value]:
    def apply(value: Value) -> Value:
        argument = _numeric(value)
        # mpmath reduces a large argument with as many digits as the argument has.
        if MP.mag(argument) > 64:
            raise Unreadable
        return _bounded(function(argument))

    return apply


FUNCTIONS: dict[str, Callable[[Value], Value]] = {
    "sqrt": lambda value: _power(value, Fraction(1, 2)),
    "ln": _moderate(lambda x: MP.log(x)),
    "sin": _moderate(lambda x: MP.sin(x)),
    "cos": _moderate(lambda x: MP.cos(x)),
    "tan": _moderate(lambda x: MP.tan(x)),
}
CONSTANTS: dict[str, Value] = {"pi": +MP.pi, "e": +MP.e, "i": MP.mpc(0, 1)}

_TOKEN = re.compile(r"\s*(?:(\d+\.?\d*|\.\d+)|(\\?)([A-Za-z]+)|([-+*/^!(){}\[\]]))", re.ASCII)
_MIXED = re.compile(r"\s*([-+]?)\s*(\d+)\s+(\d+\s*/\s*\d+)\s*", re.ASCII)
# Two letters may be a product (xy); more of them are a word, which is compared as text.
MAX_LETTERS = 2


class _Parser:
    """sum = product {+- product}; product = power {[*/] power}; power = operand [^ power], with a few LaTeX forms."""

    def __init__(self, text: str, letter: Callable[[str], Fraction]) -> None:
        self.letter, self.at, self.depth = letter, 0, 0
        self.tokens: list[str] = []
        text, position = text.rstrip(), 0
        while position < len(text):
            if not (match := _TOKEN.match(text, position)):
                raise Unreadable
            number, backslash, word, symbol = match.groups()
            named = word in FUNCTIONS or word in CONSTANTS or word == "frac"
            if word and not named and (backslash or len(word) > MAX_LETTERS):
                raise Unreadable
            self.tokens += [word] if named else list(word or "") or [number or symbol]
            position = match.end()
        self.tokens.append("")

    def next(self) -> str:
        return self.tokens[self.at]

    def take(self, *wanted: str) -> str:
        """The next token, moving on, if it is one of `wanted`; else ""."""
        if self.next() in wanted:
            self.at += 1
            return self.tokens[self.at - 1]
        return ""

    def need(self, wanted: str) -> None:
        if not self.take(wanted):
            raise Unreadable

    def whole(self) -> Value:
        value = self.sum()
        if self.next():
            raise Unreadable
        return value

    def sum(self) -> Value:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable
        value = self.product()
        while sign := self.take("+", "-"):
            term = self.product()
            value = _combine(value, term, (lambda a, b: a + b) if sign == "+" else (lambda a, b: a - b))
        self.depth -= 1
        return value

    def product(self) -> Value:
        value = self.signed()
        while True:
            if self.take("/"):
                value = _divide(value, self.signed())
            elif self.take("*") or self.starts_operand():
                value = _combine(value, self.signed(), lambda a, b: a * b)
            else:
                return value

    def starts_operand(self) -> bool:
        # Not a number: "1 000" and "1.2.3" mean nothing that we could be sure of.
        return self.next() in ("(", "{") or self.next().isalpha()

    def signed(self) -> Value:
        negative = False
        while sign := self.take("+", "-"):
            negative ^= sign == "-"
        value = self.power()
        return -value if negative else value

    def power(self) -> Value:
        base = self.operand()
        while self.take("!"):
            base = _factorial(base)
        if not self.take("^"):
            return base
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable
        value = _power(base, self.signed())
        self.depth -= 1
        return value

    def operand(self) -> Value:
        token = self.next()
        if token[:1].isdigit() or token[:1] == ".":
            return self.number()
        self.at += 1
        if token in ("(", "{"):
            value = self.sum()
            self.need(")" if token == "(" else "}")
            return value
        if token == "frac":
            return _divide(self.argument(), self.argument())
        if token == "sqrt" and self.take("["):
            root = self.sum()
            self.need("]")
            return _power(self.argument(), _divide(Fraction(1), root))
        if token in FUNCTIONS:
            return FUNCTIONS[token](self.argument() if token == "sqrt" else self.power())
        if token in CONSTANTS:
            return CONSTANTS[token]
        if len(token) == 1 and token.isalpha():
            return self.letter(token)
        raise Unreadable

    def number(self) -> Value:
        value = Fraction(self.tokens[self.at])
        self.at += 1
        # 7\frac{3}{4} is a mixed number if what it shows are three integers.
        following = "".join(self.tokens[self.at : self.at + 7])
        mixed = value.denominator == 1 and re.match(r"frac(\{\d+\}\{\d+\}|\d\d)", following)
        return value + self.operand() if mixed else value

    def argument(self) -> Value:
        r"""What a LaTeX command takes: a group or a single character, so that \frac12 is a half."""
        token = self.next()
        if not token[:1].isdigit():
            return self.operand()
        if len(token) > 1:
            self.tokens[self.at] = token[1:]
        else:
            self.at += 1
        return Fraction(token[0])


def evaluate(text: str, letter: Callable[[str], Fraction]) -> Value:
    """The value of `text`, its letters replaced by `letter(name)`.

    Returns:
      A Fraction where every operation was exact, else an mpmath number of 60 digits, the last of which may be wrong.
    Raises:
      Unreadable: no expression of this calculator, longer than MAX_CHARACTERS, undefined or larger than 2**MAX_BITS.
    """
    if len(text) > MAX_CHARACTERS:
        raise Unreadable
    if mixed := _MIXED.fullmatch(text):
        sign, whole, part = mixed.groups()
        text = f"{sign}({whole}+{part})"
    return _Parser(text, letter).whole()
