"""Equations and inequalities: what they name, the interval they mean, and when two of them say the same.

A solved relation ("x < 5") is only equal to a solved one: else the question repeated would count as its answer.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

SIGNS = "=<>≤≥≠≈≡"
_MIRROR = str.maketrans("<>≤≥", "><≥≤")
_SIGN = re.compile(f"[{SIGNS}]")
# What stands before "=" and only names what follows: x, x_1, f(x), |AB|, AB, (p,q,r), \alpha, \angle ABC, Area.
_LETTER = r"\\?[A-Za-z]+'*(?:_(?:\w|\{\w+\}))?"
_TUPLE = re.compile(rf"\({_LETTER}(?:,{_LETTER})*\)")
_LABEL = re.compile(
    rf"(?:\\(?:angle|triangle|overline)\s*)?(?:\{{?[A-Z]{{1,4}}\}}?|{_LETTER}(?:\({_LETTER}(?:,{_LETTER})*\))?)"
    rf"|[|⎸]{_LETTER}[|⎹]|[A-Za-z]+(?:\s[A-Za-z]+){{0,4}}|\S{{0,4}}[\u4e00-\u9fff]{{1,8}}"
)
_SOLVED = re.compile(rf"-?{_LETTER}")


class Relation(NamedTuple):
    """left SIGN right, as written."""

    left: str
    sign: str
    right: str


def chain(body: str) -> tuple[list[str], list[str]]:
    """The expressions between the relation signs of `body`, and the signs."""
    return [part.strip() for part in _SIGN.split(body)], _SIGN.findall(body)


def is_name(text: str) -> bool:
    """True for what only says what is being given: a letter, f(x), |AB|, (x,y), a word or two."""
    return bool(_LABEL.fullmatch(text) or _TUPLE.fullmatch(text))


def unnamed(body: str, same: Callable[[str, str], bool]) -> tuple[str, str]:
    """The name and the value of "x = 5", "f(x) = 2+3 = 5" or "5 = x"; the name is "" where there is none.

    Of a chain of equalities the last one is the value if all the others are the `same`, otherwise it is left alone.
    """
    if "∈" in body:
        name, _, rest = body.partition("∈")
        return (name.strip(), rest.strip()) if is_name(name.strip()) else ("", body)
    parts, signs = chain(body)
    if not signs or set(signs) - set("=≈") or not all(parts):
        return "", body
    name = parts.pop(0) if is_name(parts[0]) else ""
    if not name and len(parts) == 2 and is_name(parts[1]) and parts[1] not in ("e", "i"):
        return parts[1], parts[0]
    if len(parts) > 1 and not (all(same(part, parts[-1]) for part in parts[:-1])):
        return "", body
    if len(parts) > 1 and not name and any(re.search("[A-Za-z]{1}", re.sub(r"\\[A-Za-z]+", "", p)) for p in parts):
        return "", body  # an equation between two expressions
    return name, parts[-1]


def relation(body: str) -> Relation | None:
    """The one relation of `body`, None if it has none or several."""
    parts, signs = chain(body)
    return Relation(parts[0], signs[0], parts[1]) if len(signs) == 1 and all(parts) else None


def is_solved(found: Relation) -> bool:
    """True if one side is a lone letter and the other has no letter (commands apart)."""
    for side, other in [(found.left, found.right), (found.right, found.left)]:
        if _SOLVED.fullmatch(side) and not re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", other)):
            return True
    return False


def interval(body: str) -> tuple[str, str] | None:
    """The letter and the interval of a solved inequality: x > 5 is ("x", "(5,∞)"), -2 < x ≤ 3 is ("x", "(-2,3]")."""
    parts, signs = chain(body)
    if not signs or not all(parts) or set(signs) - set("<>≤≥"):
        return None
    if len(signs) == 2 and _SOLVED.fullmatch(parts[1]) and not parts[1].startswith("-"):
        if {*signs} <= {">", "≥"}:
            parts, signs = parts[::-1], [sign.translate(_MIRROR) for sign in signs[::-1]]
        if {*signs} <= {"<", "≤"}:
            return parts[1], f"{'(['[signs[0] == '≤']}{parts[0]},{parts[2]}{')]'[signs[1] == '≤']}"
        return None
    if len(signs) != 1 or not is_solved(Relation(parts[0], signs[0], parts[1])):
        return None
    left, sign, right = parts[0], signs[0], parts[1]
    if not _SOLVED.fullmatch(left):
        left, sign, right = right, sign.translate(_MIRROR), left
    if left.startswith("-"):
        left, sign, right = left[1:], sign.translate(_MIRROR), f"-({right})"
    if sign in "<≤":
        return left, f"(-∞,{right}{')]'[sign == '≤']}"
    return left, f"{'(['[sign == '≥']}{right},∞)"


def intervals(body: str) -> tuple[str, str] | None:
    """As `interval`, also for several joined by "or" or ∪, whose intervals are then joined by ∪."""
    if not any(sign in body for sign in "<>≤≥"):
        return None
    found = [interval(part.strip()) for part in re.split(r"∪|(?<![A-Za-z\\])or(?![A-Za-z])|或", body)]
    if None in found or len({letter for letter, _ in found}) != 1:
        return None
    return found[0][0], "∪".join(part for _, part in found)
