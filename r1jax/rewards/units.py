"""The words that stand behind a number: units, which may be left out, and multipliers, which may not.

A bare word is a unit only if it is on a list here ("5 x" is not 5); what stands in a text command is one unless it
changes the number ("3 \\text{ million}" is not 3).
"""

import re

# Powers of ten, as the calculator reads them.
MULTIPLIERS = {
    "hundred": "100",
    "thousand": "1000",
    "million": "10^6",
    "billion": "10^9",
    "trillion": "10^12",
    "dozen": "12",
    "万": "10^4",
    "亿": "10^8",
}
_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
NUMBER_WORDS = {word: str(i) for i, word in enumerate([*_ONES, "seventeen", "eighteen", "nineteen", "twenty"])}
NUMBER_WORDS |= {word: str(i) for i, word in enumerate("零一二三四五六七八九十")}

_WORDS = (
    "dollar cent euro pound rupee yuan degree percent pct unit second sec minute min hour hr day week month year mile"
    " foot feet ft inch inche in yard yd meter metre kilometer kilometre centimeter centimetre millimeter km cm mm kg"
    " gram kilogram mg liter litre milliliter ml gallon ounce oz lb ton mph kph kmh radian rad people person student"
    " way time page book apple candie candy cookie ticket marble piece point square cube triangle number integer term"
    " solution digit bag box boxe car tree egg card ball game child children boy girl row group set cup slice pizza"
).split()
_SYMBOLS = "m g s h L V W J N Hz Pa mol".split()  # only behind a space or before an exponent: 5m may be a product
_HAN = r"(?:(?![万亿千百十])[\u4e00-\u9fff]{1,3}(?:/[\u4e00-\u9fff]{1,3})?)"
_WORD = rf"(?:(?:{'|'.join(sorted(_WORDS, key=len, reverse=True))})(?:e?s)?)"
_QUALIFIED = (
    rf"(?:square|sq\.?|cubic|cu\.?|more|total|full|whole)?\s*{_WORD}\.?(?:\s*(?:/|per|an?|each|of)\s*[a-z]{{1,12}})?"
)
_MULTIPLIER = "|".join(MULTIPLIERS)
_BARE = re.compile(
    r"(.*[\d.)}}])\s*(?:"
    rf"(?P<times>{_MULTIPLIER})"
    rf"|(?P<word>{_QUALIFIED}|(?:per|a|an|/)\s*[a-z]{{1,12}}|{_HAN})\s*(?P<power>\^\s*\{{?[23]\}}?)?"
    rf"|(?P<symbol>(?<=\s)(?:{'|'.join(_SYMBOLS)})(?:\s*\^\s*\{{?[23]\}}?)?|(?:{'|'.join(_SYMBOLS)})\s*\^\s*\{{?[23]\}}?))",
    re.DOTALL | re.IGNORECASE,
)
# What changes the number before it, or begins another one.
_NO_UNIT = re.compile(
    r"\b(hundred|thousand|[mb]illion|trillion|dozen|half|or|and|to|over|squared|cubed|plus|minus|times|mod"
    r"|less|not|about|if|when|for|where)s?\b|\d|[=<>]"
)


def singular(words: str, exponent: str | None = None) -> str:
    """A unit in one spelling: no plural s, "cm^2" for square cm, "%" for per cent."""
    words = re.sub(r"\s+", " ", words.strip().lower().rstrip("."))
    if words in ("percent", "pct"):
        return "%"
    raised = re.search(r"[23]", exponent or "")
    if qualified := re.fullmatch(r"(square|sq\.?|cubic|cu\.?) (.+)", words):
        words = qualified[2]
    unit = {"feet": "foot", "ft": "foot", "inche": "inch"}.get(cut := re.sub(r"(?<=\w\w)s$", "", words), cut)
    power = raised[0] if raised else {"s": "2", "c": "3"}[qualified[1][0]] if qualified else ""
    return f"{unit}^{power}" if power else unit


def text_unit(words: str, exponent: str | None) -> str:
    """The unit that the words of a text command are, "" if they are none."""
    return "" if _NO_UNIT.search(words) else singular(words, exponent)


def bare_unit(text: str) -> tuple[str, str] | None:
    """What stands before a trailing unit or multiplier of the lists, and that word; None without one."""
    match = _BARE.fullmatch(text) if text[-1:].isalpha() or text[-1:] in "23}." else None
    if not match:
        return None
    if match["times"]:
        return match[1], match["times"].lower()
    word, _, exponent = (match["word"] or match["symbol"]).partition("^")
    return match[1], singular(word, exponent or match["power"])
