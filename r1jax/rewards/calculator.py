"""The operations that an answer may consist of, each bounded in the size of its result and so in time.

Values are exact fractions as long as they can be and 60-digit numbers of mpmath (sympy's arithmetic) after that;
9^9^9^9 is refused at once. sympy itself is not asked to simplify: that has no bound on time.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from mpmath import MPContext

MAX_BITS = 4096

# A context of our own: the precision of mpmath's global one belongs to the user.
MP = MPContext()
MP.dps = 60

Value = Any  # Fraction, mpf or mpc


class Unreadable(Exception):
    """The text is no expression that is known here, or one whose value is undefined or too large."""


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


def combine(left: Value, right: Value, operation: Callable[[Value, Value], Value]) -> Value:
    """The `operation` of two values, as fractions if both are; Unreadable if the result is too large."""
    if not (isinstance(left, Fraction) and isinstance(right, Fraction)):
        left, right = _numeric(left), _numeric(right)
    return _bounded(operation(left, right))


def divide(left: Value, right: Value) -> Value:
    """left / right; Unreadable for division by zero."""
    if right == 0:
        raise Unreadable
    return combine(left, right, lambda a, b: a / b)


def power(base: Value, exponent: Value) -> Value:
    """base to the exponent, exact where it is rational; Unreadable if it is undefined or too large."""
    if base == 0 and not (isinstance(exponent, Fraction) and exponent > 0):
        raise Unreadable
    if abs(_numeric(exponent)) * _bits(base) > MAX_BITS:
        raise Unreadable
    if isinstance(exponent, Fraction) and exponent.denominator == 1:
        return _bounded(base ** int(exponent))
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        return _root(base, exponent)
    return _bounded(MP.power(_numeric(base), _numeric(exponent)))


def _root(base: Fraction, exponent: Fraction) -> Value:
    """A rational power, exact where it is rational; the real one of a negative number under an odd root."""
    n, negative = exponent.denominator, base < 0 and exponent.denominator % 2 == 1
    sign, base = (-1 if negative else 1), (-base if negative else base)
    if base > 0 and n <= 64:
        above, below = (_whole_root(part, n) for part in (base.numerator, base.denominator))
        if above and below:
            return _bounded((sign * Fraction(above, below)) ** exponent.numerator)
    return _bounded(sign**exponent.numerator * MP.power(_numeric(base), _numeric(exponent)))


def _whole_root(number: int, n: int) -> int | None:
    root = int(MP.nint(MP.root(number, n))) if number.bit_length() < 180 else 0
    return root if root and root**n == number else None


def _whole(value: Value) -> int:
    if not (isinstance(value, Fraction) and value.denominator == 1):
        raise Unreadable
    return int(value)


def factorial(value: Value) -> Value:
    """value!; Unreadable unless it is a whole number from 0 to 200."""
    if not 0 <= (whole := _whole(value)) <= 200:
        raise Unreadable
    return Fraction(math.factorial(whole))


def binomial(above: Value, below: Value) -> Value:
    """How many ways to choose `below` of `above`; Unreadable unless both are whole and above is at most 1000."""
    if not 0 <= (n := _whole(above)) <= 1000:
        raise Unreadable
    return _bounded(Fraction(math.comb(n, k) if (k := _whole(below)) >= 0 else 0))


def logarithm(value: Value, base: Value) -> Value:
    """Raises Unreadable where there is none."""
    if value == 0 or base in (0, 1):
        raise Unreadable
    return divide(_bounded(MP.log(_numeric(value))), _bounded(MP.log(_numeric(base))))


def _moderate(function: Callable[[Any], Any]) -> Callable[[Value], Value]:
    def apply(value: Value) -> Value:
        argument = _numeric(value)
        # mpmath reduces a large argument with as many digits as the argument has.
        if MP.mag(argument) > 64:
            raise Unreadable
        try:
            return _bounded(function(argument))
        except (ValueError, ZeroDivisionError):  # a pole
            raise Unreadable from None

    return apply


def _real(value: Value) -> Any:
    """A real value, as a Fraction or an mpmath number; Unreadable if it is complex."""
    if isinstance(value, Fraction):
        return value
    number = _numeric(value)
    if abs(number.imag) > abs(number.real) * MP.mpf(10) ** -45:
        raise Unreadable
    return number.real


def _order(value: Value) -> Any:
    return MP.convert(_real(value))


def _to_whole(direction: Callable[[Any], Any]) -> Callable[[Value], Value]:
    def apply(value: Value) -> Value:
        real = _real(value)
        if not isinstance(real, Fraction):
            if MP.mag(real) > 120:  # its last digits are not known
                raise Unreadable
            near = MP.nint(real)
            real = near if abs(real - near) < MP.mpf(10) ** -30 else direction(real)
        return Fraction(int(direction(real)))

    return apply


def _greatest_divisor(values: list[Value]) -> Value:
    """Of rationals: what divides all of them a whole number of times."""
    if not all(isinstance(value, Fraction) for value in values):
        raise Unreadable
    below = math.lcm(*(value.denominator for value in values))
    return Fraction(math.gcd(*(int(value * below) for value in values)), _bounded(Fraction(below)))


def _least_multiple(values: list[Value]) -> Value:
    found = values[0]
    for value in values[1:]:
        divisor = _greatest_divisor([found, value])
        found = _bounded(abs(found * value / divisor)) if divisor else divisor
    return found


def _magnitude(value: Value) -> Value:
    return abs(value) if isinstance(value, Fraction) else MP.mpf(abs(value))


FUNCTIONS: dict[str, Callable[[Value], Value]] = {
    "sqrt": lambda value: power(value, Fraction(1, 2)),
    "abs": _magnitude,
    "exp": lambda value: power(CONSTANTS["e"], value),
    "floor": _to_whole(math.floor),
    "ceil": _to_whole(math.ceil),
    "lg": lambda value: logarithm(value, Fraction(10)),
    "sec": _moderate(lambda x: 1 / MP.cos(x)),
    "csc": _moderate(lambda x: 1 / MP.sin(x)),
    "cot": _moderate(lambda x: MP.cos(x) / MP.sin(x)),
    "ln": lambda value: logarithm(value, CONSTANTS["e"]),
}
for _name in "sin cos tan sinh cosh tanh asin acos atan".split():
    FUNCTIONS[_name] = _moderate(getattr(MP, _name))
for _name in ("sin", "cos", "tan"):
    FUNCTIONS["arc" + _name] = FUNCTIONS["a" + _name]
# Of any number of arguments.
OF_LISTS: dict[str, Callable[[list[Value]], Value]] = {
    "max": lambda values: max(values, key=_order),
    "min": lambda values: min(values, key=_order),
    "gcd": _greatest_divisor,
    "lcm": _least_multiple,
}
CONSTANTS: dict[str, Value] = {"pi": +MP.pi, "e": +MP.e, "i": MP.mpc(0, 1)}
GREEK = frozenset(
    "alpha beta gamma delta epsilon theta lambda mu phi omega sigma rho tau psi xi eta kappa nu zeta".split()
)
WORDS = frozenset([*FUNCTIONS, *OF_LISTS, *CONSTANTS, *GREEK, "frac", "binom", "log"])
CLOSING = {"(": ")", "{": "}", "[": "]", "⎸": "⎹", "|": "|", "⌊": "⌋", "⌈": "⌉"}
AROUND = {"⎸": "abs", "|": "abs", "⌊": "floor", "⌈": "ceil"}
