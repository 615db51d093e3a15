"""Takes off what only decorates a written answer: delimiters, spacing, text commands, currency, units, thousands.

The families of spelling are those of the MATH answers (Hendrycks et al., 2021; the normalisation of Minerva, Lewkowycz
et al., 2022, appendix D.1). Units are kept beside the body, so that 5 feet is not taken for 5 inches.
"""

import re
from typing import NamedTuple

_SPELLINGS = {
    "\u200b": "", "\u2060": "", "\ufeff": "", "\u00a0": " ",
    "−": "-", "–": "-", "×": "*", "·": "*", "⋅": "*", "÷": "/", "π": r"\pi ", "√": r"\sqrt ", "°": r"^\circ", "**": "^",
    r"\(": "", r"\)": "", r"\[": "", r"\]": "", r"\$": "", "$": "", r"\%": "%", r"\{": "⦃", r"\}": "⦄",
    r"\,": " ", r"\;": " ", r"\:": " ", r"\ ": " ", "~": " ", r"\!": "",
}  # fmt: skip
_SPELLING = re.compile("|".join(map(re.escape, _SPELLINGS)))
_COMMANDS = {
    "left": "", "right": "", "quad": " ", "qquad": " ", "displaystyle": "",
    "dfrac": r"\frac", "tfrac": r"\frac", "cdot": "*", "times": "*", "div": "/",
}  # fmt: skip
_COMMAND = re.compile(rf"\\({'|'.join(_COMMANDS)})(?![A-Za-z])")

_THOUSANDS_MARK = re.compile(r"(?<=\d)(?:\{,\}|,\\!)\s*(?=\d{3}(?!\d))")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?")
_CURRENCY = re.compile(r"\s*[-+]?\s*(\\\$|\$(?=[^$]*$))")
_DEGREES = re.compile(r"(.*\S)\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})\s*", re.DOTALL)
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf)\s*\{([^{}]*)\}")
# Bare words are units only if they are on this list: "5 x" is not 5.
_BARE_UNITS = (
    r"(?:square |sq |cubic )?(?:dollars?|cents?|degrees?|percent|pct|units?|seconds?|minutes?|hours?|days?|weeks?"
    r"|months?|years?|miles?|feet|foot|ft|inch(?:es)?|yards?|met(?:er|re)s?|km|cm|mm|kg|grams?|lit(?:er|re)s?"
    r"|gallons?|pounds?|mph)"
)
_UNIT = re.compile(
    rf"(.*[\d.)}}])\s*(?:\\(?:text|mbox|mathrm)\s*\{{([^{{}}]*)\}}|({_BARE_UNITS}))\s*(?:\^\s*\{{?[23]\}}?)?", re.DOTALL
)
# Words that change the number before them: "3 \text{ million}" is not 3.
_NO_UNIT = re.compile(
    r"\b(hundred|thousand|[mb]illion|trillion|dozen|half|or|and|to|over|squared|cubed|more|less)s?\b|\d"
)
_CONJUNCTION = re.compile(r"\s*,?\s*(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])\s*")


class Reading(NamedTuple):
    """An answer without decoration and its unit: "" if none is written, "%" for a percentage, "dollar" for a $."""

    body: str
    unit: str


def read(text: str) -> Reading:
    """The answer that `text` writes, plain or in LaTeX, without what only decorates it."""
    unit = "dollar" if _CURRENCY.match(text) else ""
    text = _THOUSANDS_MARK.sub("", text)
    text = _SPELLING.sub(lambda m: _SPELLINGS[m[0]], text)
    text = _COMMAND.sub(lambda m: _COMMANDS[m[1]], text).strip()
    text = text.removesuffix(".").rstrip()
    if degrees := _DEGREES.fullmatch(text):
        text, unit = degrees[1], "degree"
    elif text.endswith("%"):
        text, unit = text[:-1], "%"
    elif match := _UNIT.fullmatch(text):
        words = (match[2] or match[3] or "").strip().lower()
        if words and not _NO_UNIT.search(words):
            unit = "%" if words in ("percent", "pct") else re.sub(r"(?<=\w\w)s$", "", words)
            text = match[1]
    text = _TEXT.sub(r" \1 ", text)
    # A space stays where it separates: "1 1/2" is not 11/2.
    text = re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", re.sub(r"\s+", " ", text))
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    if option := re.fullmatch(r"\(([A-Z])\)", text):
        text = option[1]
    return Reading(text, unit)


def _split(text: str) -> list[str] | None:
    """`text` cut at the commas outside all brackets; None if brackets do not match (of which kind does not matter)."""
    depth, start, parts = 0, 0, []
    for i, symbol in enumerate(text):
        depth += (symbol in "([{⦃") - (symbol in ")]}⦄")
        if depth < 0:
            return None
        if symbol == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return None if depth else [*parts, text[start:].strip()]


def items(body: str) -> tuple[str, list[str]] | None:
    """The two brackets of a tuple or interval, "" for a bare list or a set (which have no order), and what it holds.

    None if `body` is a single thing or not well formed.
    """
    body = _CONJUNCTION.sub(",", body)
    brackets, parts = "", _split(body)
    if parts and len(parts) == 1 and body[:1] in ("(", "[", "⦃") and body[-1:] in (")", "]", "⦄"):
        brackets, parts = body[0] + body[-1], _split(body[1:-1])
    if not parts or not all(parts) or (len(parts) == 1 and brackets != "⦃⦄"):
        return None
    return brackets.replace("⦃⦄", ""), parts
