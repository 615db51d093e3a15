"""Cuts an answer into the parts that are compared one by one: tuples, sets, lists, intervals, unions, matrices.

Brackets and order are part of an answer where they mean something: (0,1) is not [0,1), a set has no order.
"""

import re
from typing import NamedTuple

_CONJUNCTION = re.compile(r"\s*,?\s*(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])\s*|\s*,?\s*[和或及]\s*")
_OPEN, _CLOSE = "([{⦃⟨", ")]}⦄⟩"
_MATRIX = re.compile(r"(.*?)\\begin\s*\{(v?matrix|Vmatrix|cases)\}(.*)\\end\s*\{\2\}", re.DOTALL)


class Parts(NamedTuple):
    """What an answer is made of: `kind` is "" for a list or set, which has no order, "∪" for a union likewise.

    Otherwise kind tells of order and shape: the brackets of a tuple or interval, or "matrix" with rows and columns.
    """

    kind: str
    items: list[str]
    distinct: bool = False  # a set: what stands twice counts once


def _split(text: str, separators: str) -> list[str] | None:
    """`text` cut at separators outside all brackets; None if brackets do not match (of which kind does not matter)."""
    depth, start, parts = 0, 0, []
    for i, symbol in enumerate(text):
        depth += (symbol in _OPEN) - (symbol in _CLOSE)
        if depth < 0:
            return None
        if depth == 0 and symbol in separators:
            parts.append(text[start:i].strip())
            start = i + 1
    return None if depth else [*parts, text[start:].strip()]


def _matrix(body: str) -> Parts | None:
    while body[:1] + body[-1:] in ("()", "[]") and _split(body[1:-1], "") is not None:
        body = body[1:-1].strip()
    match = _MATRIX.fullmatch(body)
    if not match:
        return None
    factor, kind = match[1].strip().rstrip("*"), match[2]
    rows = [[cell.strip() for cell in row.split("&")] for row in match[3].split("⏎") if row.strip()]
    cells = [cell for row in rows for cell in row]
    if not cells or len({len(row) for row in rows}) != 1:
        return None
    if factor:
        cells = [f"({factor})*({cell})" for cell in cells]
    return Parts(f"{kind} {len(rows)} {len(rows[0])}", cells)


def _both_signs(part: str) -> list[str]:
    if "±" not in part and "∓" not in part:
        return [part]
    return [part.replace("±", plus).replace("∓", minus).removeprefix("+") for plus, minus in ("+-", "-+")]


def parts(body: str) -> Parts | None:
    """The parts of `body`; None if it is a single thing or not well formed."""
    if "\\begin" in body:
        return _matrix(body)
    body = _CONJUNCTION.sub(",", body)
    if "∪" in body and (found := _split(body, "∪")) and len(found) > 1:
        return Parts("∪", found) if all(found) else None
    found = _split(body, ",") or []
    if len(found) == 1:
        found = _split(body, ";") or []
    if len(found) > 1 or (found and "±" in body):
        found = [signed for part in found for signed in _both_signs(part)]
        return Parts("", found) if all(found) and len(found) > 1 else None
    if ":" in body and (ratio := _split(body, ":")) and len(ratio) > 1:
        return Parts(":", ratio) if all(ratio) else None
    brackets = body[:1] + body[-1:]
    if not found or len(body) < 2 or body[0] not in _OPEN or body[-1] not in _CLOSE:
        return None
    inner = _split(body[1:-1], ",")
    if inner and len(inner) == 1 and brackets in ("()", "[]"):
        inner = _split(body[1:-1], ";")
    if not inner or not all(inner):
        return None
    if brackets == "⦃⦄" or (brackets == "{}" and len(inner) > 1):
        return Parts("", [signed for part in inner for signed in _both_signs(part)], distinct=True)
    # A single thing in parentheses is only grouped.
    return Parts(brackets.replace("⟨", "(").replace("⟩", ")"), inner) if len(inner) > 1 else None
