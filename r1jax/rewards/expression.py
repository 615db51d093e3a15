"""Reads a short expression, plain or in LaTeX, and hands its operations to the calculator as it goes.

A recursive-descent parser over a closed grammar; it keeps no tree. What it does not know is Unreadable, never guessed.
"""

import re
from collections.abc import Callable
from fractions import Fraction

from r1jax.rewards.calculator import (
    AROUND,
    CLOSING,
    CONSTANTS,
    FUNCTIONS,
    GREEK,
    OF_LISTS,
    WORDS,
    Unreadable,
    Value,
    binomial,
    combine,
    divide,
    factorial,
    logarithm,
    power,
)  # fmt: skip

MAX_CHARACTERS = 400
MAX_DEPTH = 40
# Two letters may be a product (xy), three beside an operator; more of them are a word, which is compared as text.
MAX_LETTERS = 2

_TOKEN = re.compile(
    r"\s*(?:((?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3}(?![\d.]))?)|(\\?)([A-Za-z]+)|([-+*/^!°(){}\[\]|_,'⌊⌋⌈⌉⎸⎹]))",
    re.ASCII,
)
_MIXED = re.compile(r"\s*([-+]?)\s*(\d+)\s+(\d+\s*/\s*\d+)\s*", re.ASCII)
_DEGREE = re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})\s*")
RADIANS = divide(CONSTANTS["pi"], Fraction(180))  # in a degree
_FORMULA = re.compile(r"[-+*/^\d]")


class _Parser:
    """sum = product {+- product}; product = power {[*/] power}; power = operand [^ power], with a few LaTeX forms."""

    def __init__(self, text: str, letter: Callable[[str], Fraction], log_base: Value) -> None:
        self.letter, self.log_base, self.at, self.depth, self.bars = letter, log_base, 0, 0, 0
        self.tokens: list[str] = []
        letters = MAX_LETTERS + bool(_FORMULA.search(text))
        text, position = text.rstrip(), 0
        while position < len(text):
            if not (match := _TOKEN.match(text, position)):
                raise Unreadable
            number, backslash, word, symbol = match.groups()
            named = word in WORDS and (backslash or word not in GREEK)
            if word and not named and (backslash or len(word) > letters):
                raise Unreadable
            self.tokens += ["\\" + word if word in GREEK else word] if named else list(word or "") or [number or symbol]
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

    def deeper(self, parse: Callable[[], Value]) -> Value:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable
        value = parse()
        self.depth -= 1
        return value

    def whole(self) -> Value:
        value = self.sum()
        if self.next():
            raise Unreadable
        return value

    def sum(self) -> Value:
        return self.deeper(self._sum)

    def _sum(self) -> Value:
        value = self.product()
        while sign := self.take("+", "-"):
            term = self.product()
            value = combine(value, term, (lambda a, b: a + b) if sign == "+" else (lambda a, b: a - b))
        return value

    def product(self) -> Value:
        value = self.signed()
        while True:
            if self.take("/"):
                value = divide(value, self.signed())
            elif self.take("*") or self.starts_operand():
                value = combine(value, self.signed(), lambda a, b: a * b)
            else:
                return value

    def starts_operand(self) -> bool:
        # Not a number: "1 000" and "1.2.3" mean nothing that we could be sure of.
        token = self.next()
        return token in ("(", "{", "⎸", "⌊", "⌈") or token.lstrip("\\").isalpha() or (token == "|" and not self.bars)

    def signed(self) -> Value:
        negative = False
        while sign := self.take("+", "-"):
            negative ^= sign == "-"
        value = self.power()
        return -value if negative else value

    def power(self) -> Value:
        base = self.operand()
        while mark := self.take("!", "°"):
            base = factorial(base) if mark == "!" else combine(base, RADIANS, lambda a, b: a * b)
        return power(base, self.deeper(self.exponent)) if self.take("^") else base

    def exponent(self) -> Value:
        # x^12 is x to the twelfth, as most people write it who forget the braces.
        return self.signed()

    def operand(self) -> Value:
        token = self.next()
        if token[:1].isdigit() or token[:1] == ".":
            return self.number()
        self.at += 1
        if token in CLOSING and token != "[":
            self.bars += token == "|"
            value = self.sum()
            self.need(CLOSING[token])
            self.bars -= token == "|"
            return FUNCTIONS[AROUND[token]](value) if token in AROUND else value
        if token in ("frac", "binom"):
            above, below = self.argument(), self.argument()
            return divide(above, below) if token == "frac" else binomial(above, below)
        if token == "sqrt" and self.take("["):
            root = self.sum()
            self.need("]")
            return power(self.argument(), divide(Fraction(1), root))
        if token == "log":
            return self.logarithm()
        if token in OF_LISTS:
            return self.of_list(token)
        if token in FUNCTIONS:
            return self.function(token)
        if token in CONSTANTS:
            return CONSTANTS[token]
        if token.lstrip("\\").isalpha():
            return self.letter(token + self.marks())
        raise Unreadable

    def marks(self) -> str:
        """The index and primes of a letter, as part of its name."""
        marks = ""
        while mark := self.take("_", "'"):
            marks += mark
            if mark == "_" and self.next():
                depth = 0
                while True:
                    token = self.next()
                    depth += (token == "{") - (token == "}")
                    if not token:
                        raise Unreadable
                    self.at += 1
                    marks += token if token not in "{}" else ""
                    if not depth:
                        break
        return marks

    def function(self, name: str) -> Value:
        if name == "sqrt":
            return FUNCTIONS[name](self.argument())
        exponent = self.deeper(self.argument) if self.take("^") else Fraction(1)
        argument = self.function_argument()
        if exponent == -1 and name in ("sin", "cos", "tan"):
            return FUNCTIONS["a" + name](argument)
        return power(FUNCTIONS[name](argument), exponent) if exponent != 1 else FUNCTIONS[name](argument)

    def function_argument(self) -> Value:
        r"""What a function without parentheses takes: \sin 2\pi x and \sin x^2 whole, \sin x \cos y only x."""
        if self.next() in ("(", "{"):
            return self.operand()
        value = self.power()
        while self.next() not in FUNCTIONS.keys() | {"log"} and self.starts_operand():
            value = combine(value, self.power(), lambda a, b: a * b)
        return value

    def logarithm(self) -> Value:
        base = self.argument() if self.take("_") else self.log_base
        exponent = self.deeper(self.argument) if self.take("^") else Fraction(1)
        return power(logarithm(self.function_argument(), base), exponent)

    def of_list(self, name: str) -> Value:
        closing = CLOSING[self.take("(", "{") or self.take("[") or "("] if self.next() in ("(", "{", "[") else ""
        values = [self.sum()]
        while self.take(","):
            values.append(self.sum())
        if not closing or not self.take(closing):
            raise Unreadable
        return OF_LISTS[name](values)

    def number(self) -> Value:
        if self.next() == ".":  # what \log_2. leaves of its number
            raise Unreadable
        value = Fraction(self.next())
        self.at += 1
        # 7\frac{3}{4} is a mixed number if what it shows are three integers.
        following = "".join(self.tokens[self.at : self.at + 7])
        mixed = value.denominator == 1 and re.match(r"frac(\{\d+\}\{\d+\}|\d\d)", following)
        return value + self.operand() if mixed else value

    def argument(self) -> Value:
        r"""What a LaTeX command takes: a group or a single character, so that \frac12 is a half."""
        token = self.next()
        if token == "-":  # x^-1
            self.at += 1
            return -self.argument()
        if not token[:1].isdigit():
            return self.deeper(self.operand)
        if len(token) > 1:
            self.tokens[self.at] = token[1:]
        else:
            self.at += 1
        return Fraction(token[0])


def evaluate(text: str, letter: Callable[[str], Fraction], log_base: Value = CONSTANTS["e"]) -> Value:
    r"""The value of `text`, its letters replaced by `letter(name)`, where \log without a base has base `log_base`.

    Returns:
      A Fraction where every operation was exact, else an mpmath number of 60 digits, the last of which may be wrong.
    Raises:
      Unreadable: no expression of this grammar, longer than MAX_CHARACTERS, undefined or larger than 2**MAX_BITS.
    """
    if len(text) > MAX_CHARACTERS:
        raise Unreadable
    if mixed := _MIXED.fullmatch(text):
        sign, whole, part = mixed.groups()
        text = f"{sign}({whole}+{part})"
    if "\\circ" in text:
        text = _DEGREE.sub("°", text)
    return _Parser(text, letter, log_base).whole()
