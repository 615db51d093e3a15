"""Takes off what only decorates a written answer: delimiters, spacing, text commands, currency, units, thousands.

The families of spelling are those of the MATH answers (Hendrycks et al., 2021; the normalisation of Minerva, Lewkowycz
et al., 2022, appendix D.1), and what Unicode and Chinese add. Units are kept beside the body, so that 5 feet is not
taken for 5 inches. Nothing here gives a text a value: that is the calculator's part.
"""

import functools
import re
import unicodedata
from typing import NamedTuple

from r1jax.rewards.units import MULTIPLIERS, NUMBER_WORDS, bare_unit, text_unit

_UNICODE = {
    "\u200b": "", "\u200c": "", "\u200d": "", "\u2060": "", "\ufeff": "", "\u00a0": " ", "\u202f": " ", "\u2009": " ",
    "−": "-", "–": "-", "—": "-", "×": "*", "·": "*", "⋅": "*", "∙": "*", "÷": "/", "∕": "/", "⁄": "/", "√": r"\sqrt ",
    "°": r"^\circ ", "℃": r"^\circ ", "π": r"\pi ", "⩽": "≤", "≦": "≤", "⩾": "≥", "≧": "≥", "≃": "≈",
    "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "θ": r"\theta ", "λ": r"\lambda ",
    "μ": r"\mu ", "φ": r"\phi ", "ω": r"\omega ", "ℝ": r"\mathbb{R}", "∅": r"\emptyset ", "。": ".", "，": ",",
    "、": ",", "：": ":", "（": "(", "）": ")", "【": "[", "】": "]", "“": "", "”": "", "′": "'", "…": r"\ldots ",
}  # fmt: skip
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿˣ", "0123456789-+nx", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉ₙ", "0123456789n", strict=True))
_SPELLINGS = {
    "**": "^", "<=": "≤", ">=": "≥", "!=": "≠", r"\(": "", r"\)": "", r"\[": "", r"\]": "", r"\$": "", "$": "",
    r"\%": "%", r"\{": "⦃", r"\}": "⦄", r"\|": "|", r"\,": " ", r"\;": " ", r"\:": " ", r"\ ": " ", "~": " ",
    r"\!": "", r"\#": "#", r"\&": "and", r"\_": "_",
}  # fmt: skip
_SPELLING = re.compile("|".join(map(re.escape, _SPELLINGS)))
_COMMANDS = {
    **dict.fromkeys("left right big Big bigg Bigg bigl bigr Bigl Bigr limits".split(), ""),
    **dict.fromkeys("displaystyle textstyle boldsymbol mathbf mathit mathsf mathcal vec hat bf rm it".split(), ""),
    **dict.fromkeys("quad qquad hspace thinspace enspace".split(), " "),
    **dict.fromkeys("dfrac tfrac cfrac".split(), r"\frac"), **dict.fromkeys("dbinom tbinom".split(), r"\binom"),
    **dict.fromkeys("cdot times ast".split(), "*"), "div": "/",
    **dict.fromkeys("le leq leqslant".split(), "≤"), **dict.fromkeys("ge geq geqslant".split(), "≥"),
    **dict.fromkeys("ne neq".split(), "≠"), "lt": "<", "gt": ">", **dict.fromkeys("approx simeq".split(), "≈"),
    "equiv": "≡", "cup": "∪", "in": "∈", "pm": "±", "mp": "∓", "infty": "∞", "colon": ":",
    "lbrace": "⦃", "rbrace": "⦄", "langle": "⟨", "rangle": "⟩", "lbrack": "[", "rbrack": "]",
    "lfloor": "⌊", "rfloor": "⌋", "lceil": "⌈", "rceil": "⌉", "lvert": "⎸", "rvert": "⎹", "vert": "|", "mid": "|",
    **dict.fromkeys("rightarrow longrightarrow".split(), r"\to"), **dict.fromkeys("bmod pmod".split(), r"\mod"),
    "varnothing": r"\emptyset ", "varphi": r"\phi ", "varepsilon": r"\epsilon ", "dots": r"\ldots ",
    "cdots": r"\ldots ",
    "degree": r"^\circ ", "backslash": "", "newline": " ", "exponentialE": "e", "imaginaryI": "i",
}  # fmt: skip
_COMMAND = re.compile(rf"\\({'|'.join(_COMMANDS)})(?![A-Za-z])")
_SIZED_BAR = re.compile(r"\\(left|right)\s*(?:\\?\||\\[lr]?vert(?![A-Za-z]))")
_OPERATOR = re.compile(
    r"\\(?:operatorname|mathop)\s*\*?\s*\{\s*([A-Za-z]+)\s*\}|\\(?:mathrm|text)\s*\{(ceil|floor|lcm|gcd)\}"
)
_PHANTOM = re.compile(r"\\(?:[hv]?phantom|label|tag)\s*\{[^{}]*\}")
_BOXED = re.compile(r"\\f?boxed\s*(?=\{)")

_THOUSANDS_MARK = re.compile(r"(?<=\d)(?:\{,\}|,\s?\\!|\\,)\s*(?=\d{3}(?!\d))")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_CURRENCY = re.compile(r"\s*[-+]?\s*(\\\$|\$(?=[^$]*$)|[€£¥₹])")
_DEGREES = re.compile(r"(.*\S)\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})\s*([CF]?)\s*", re.DOTALL)
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|textnormal|mbox|mathrm|emph|hbox)\s*\{([^{}]*)\}")
_TEXT_UNIT = re.compile(
    r"(.*[\d.)}}])\s*\\(?:text|textrm|mbox|mathrm|rm)\s*\{([^{}]*)\}\s*(\^\s*\{?[23]\}?)?", re.DOTALL
)
_BASE = re.compile(r"\(?([0-9A-F]+)\)?_\{?(\d{1,2})\}?")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))")
_SUPER_SUB = re.compile(r"\^(\{(?:[^{}]|\{[^{}]*\})*\}|\w)_(\{(?:[^{}]|\{[^{}]*\})*\}|\w)")
_LONE_BRACES = re.compile(r"(?<=[_^])\{([\w+])\}")
_OPTION = re.compile(r"\(([A-Za-z])\)|([A-Z])[).:]")
_LEAD = re.compile(r"\s*(?:the\s+)?(?:final\s+)?(?:answer|option|choice)(?:\s+is)?\s*:?\s+(?=\S)", re.IGNORECASE)
_NOTHING = re.compile(r"(?i)no(?:\s+real)?\s+solutions?|(?:the\s+)?empty\s+set|\\emptyset|⦃⦄|none")
_EVERYTHING = re.compile(r"(?i)all\s+real(?:s|\s+numbers)?|\\mathbb\{?R\}?|R")


class Reading(NamedTuple):
    """An answer without decoration and its unit: "" if none is written, "%" for a percentage, "dollar" for a $."""

    body: str
    unit: str


def _ascii(text: str) -> str:
    """Unicode spellings as LaTeX or ASCII would write them."""
    out = []
    for symbol in text:
        if symbol in _UNICODE:
            out.append(_UNICODE[symbol])
        elif symbol in _RAISED or symbol in _LOWERED:
            mark, plain = ("^", _RAISED[symbol]) if symbol in _RAISED else ("_", _LOWERED[symbol])
            if out and out[-1].startswith(mark + "{"):
                out[-1] = f"{out[-1][:-1]}{plain}}}"
            else:
                out.append(f"{mark}{{{plain}}}")
        elif "！" <= symbol <= "～":
            out.append(chr(ord(symbol) - 0xFEE0))
        elif (digit := unicodedata.decimal(symbol, None)) is not None:
            out.append(str(digit))
        elif unicodedata.decomposition(symbol).startswith("<fraction>"):
            above, _, below = unicodedata.normalize("NFKC", symbol).partition("⁄")
            out.append(rf"\frac{{{above}}}{{{below}}}")
        else:
            out.append(symbol)
    return "".join(out)


def _repeating(match: re.Match[str]) -> str:
    whole, fixed, cycle = match[1] or "0", match[2], match[3] or match[4]
    numerator = int(whole + fixed + cycle) - int(whole + fixed)
    return f"({numerator}/{(10 ** len(cycle) - 1) * 10 ** len(fixed)})"


def boxes(text: str) -> list[tuple[int, int]]:
    """Where the contents of the outermost closed boxes of `text` start and end, in their order; linear in the text."""
    found, unclosed = [], []
    for match in _BRACES.finditer(text):
        if match[1] or match[0] == "{":
            unclosed.append(match.end() if match[1] else 0)
        elif match[0] == "}" and unclosed and (start := unclosed.pop()):
            while found and found[-1][0] > start:  # an inner one
                found.pop()
            found.append((start, match.start()))
    return found


_BRACES = re.compile(r"(\\f?boxed\s*\{)|\\.|\{|\}", re.DOTALL)


@functools.lru_cache(maxsize=1024)
def read(text: str) -> Reading:
    """The answer that `text` writes, plain or in LaTeX, without what only decorates it."""
    if "boxed" in text and (spans := boxes(text)):
        text = ", ".join(text[slice(*span)] for span in spans)
    currency = bool(_CURRENCY.match(text))
    unit = "dollar" if currency else ""
    text = _THOUSANDS_MARK.sub("", text)
    if not text.isascii():
        text = _ascii(re.sub(r"[€£¥₹]", "", text))
    text = _SIZED_BAR.sub(lambda m: "⎸" if m[1] == "left" else "⎹", text)
    text = _OPERATOR.sub(lambda m: f"\\{m[1] or m[2]} ", _PHANTOM.sub("", text)) if "\\" in text else text
    text = _separate_rows(text)
    text = _SPELLING.sub(lambda m: _SPELLINGS[m[0]], text)
    text = _COMMAND.sub(lambda m: _COMMANDS[m[1]], text).strip()
    text = text.rstrip(".,;").rstrip() if not text.endswith("...") else text
    text = text.removeprefix("≈").strip().strip("`*").strip()
    text = re.sub(r"\^\s*\\prime", "'", text)
    if "∞" in text:
        text = re.sub(r"(^|[(\[,])\s*\+\s*∞", r"\1∞", text)
    text, unit = _without_unit(text, unit)
    text = _TEXT.sub(r" \1 ", text)
    if "\\overline" in text or "\\bar" in text or "\\dot" in text:
        text = _REPEATING.sub(_repeating, text)
    # A space stays where it separates: "1 1/2" is not 11/2.
    text = re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", re.sub(r"\s+", " ", _LEAD.sub("", text))).strip()
    if "_" in text:
        text = _LONE_BRACES.sub(r"\1", _SUPER_SUB.sub(r"_\2^\1", text))
        text = _LONE_BRACES.sub(r"\1", text)
        if base := _BASE.fullmatch(text):
            return Reading(base[1], f"base {base[2]}")
    # Of a tuple (100,200) the comma separates; (1,000) is too rare to matter.
    if "," in text and (currency or re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?", text) or _in_sum(text)):
        text = _THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)
    return Reading(_plain_words(text), unit)


def _in_sum(text: str) -> bool:
    r"""True for 1,234+5 or 1,234\pi: a thousands comma in one expression rather than a list."""
    return bool(
        re.fullmatch(r"[^,]*[-+*/=<>≤≥^\\][^,]*\d,\d{3}(?!\d)[^,]*|[-+]?\d{1,3},\d{3}(?!\d)[^,\s]+", text)
    ) and not (set("([⦃") & set(text))


def _separate_rows(text: str) -> str:
    r"""A line break \\ and the & of a matrix as characters that no other rule touches."""
    if "\\begin" not in text:
        return text.replace("\\\\", "\\") if "\\\\" in text else text
    text = re.sub(r"\\begin\s*\{array\}\s*\{[^{}]*\}", r"\\begin{matrix}", text).replace(
        r"\end{array}", r"\end{matrix}"
    )
    text = re.sub(r"(begin|end)\s*\{[pbB]?(?:small)?matrix\*?\}", r"\1{matrix}", text)
    text = re.sub(r"\\\\(?:\[[^\]]*\])?|\\cr(?![A-Za-z])", "⏎", text)
    return re.sub(r"\\hline", "", text)


def _without_unit(text: str, unit: str) -> tuple[str, str]:
    if degrees := _DEGREES.fullmatch(text):
        # In \sin 30^\circ the sign belongs to the argument.
        return (text, unit) if re.search(r"\\(sin|cos|tan|cot|sec|csc)", text) else (degrees[1], "degree")
    if text.endswith("%"):
        return text[:-1].rstrip(), "%"
    if match := _TEXT_UNIT.fullmatch(text):
        words = match[2].strip().lower()
        for word, factor in MULTIPLIERS.items():
            if words == word or words.startswith(word + " "):
                return f"({match[1]})*{factor}", unit
        if words and (found := text_unit(words, match[3])):
            return match[1], found
    if match := bare_unit(text):
        body, word = match
        if word in MULTIPLIERS:
            return f"({body})*{MULTIPLIERS[word]}", unit
        return body, unit or word
    return text, unit


def _plain_words(text: str) -> str:
    if len(text) > 40 and not text.startswith("\\"):
        return text
    if option := _OPTION.fullmatch(text):
        return (option[1] or option[2]).upper()
    if _NOTHING.fullmatch(text):
        return r"\emptyset"
    if _EVERYTHING.fullmatch(text):
        return "(-∞,∞)"
    return NUMBER_WORDS.get(text.casefold(), text)
