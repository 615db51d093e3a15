r"""Finds the final answer of a completion: the last one that it marks as such, behind the thinking.

A mark is a box, `<answer>` tags, "#### " or the words "final answer" (in this order of the report, arXiv 2501.12948,
section 2.2, of GSM8K and of Minerva's prompt). Where nothing is marked, the last formula or number that stands in the
sentence that gives the answer is taken. There is one answer only: boxes that only "and" or a comma joins are one list,
so that nobody can box every candidate. All patterns are linear in the text or work on its last part.
"""

import re

from r1jax.rewards.form import ANSWER, ANSWER_END, after_thinking, answer_span
from r1jax.rewards.latex import boxes

# Where no answer is marked, it is looked for in so many last characters.
TAIL_CHARACTERS = 2000

_SPECIAL = re.compile(r"<\|[a-z_]{1,40}\|>|<｜[^｜<>]{1,40}｜>")
_JOINT = re.compile(r"(?:[\s,;$.]|\\[\]\[(),;! ]|\\q?quad|\\text\s*\{\s*(?:and|or|,)?\s*\}|and|or|和|或|、|，|\\\\|&)*")
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_FINAL = re.compile(r"(?i)final answer\s*(?:is|are|:|：|\*|\s)+|最终答案\s*(?:是|为|：|:|\*|\s)+")
_CUE = re.compile(
    r"(?i)(?:\banswer|\bsolution|\bresult|\bréponse|\brespuesta|\bantwort|\brisposta|\bresposta|\bответ|答案|答|结果|결과|답|答え)"
    r"(?:\s*(?:\bis\b|\bare\b|\best\b|\bes\b|\bist\b|\bé\b|\bè\b|:|：|=|是|为|為|は|은|는|\*)+\s*|\s+(?=[\\$(\d-]))"
)
_FORMULA = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_NUMBER = re.compile(
    r"(?:[$€£¥]\s?)?(?<![\w.])[-−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s?/\s?\d+(?!\d*/)|(?:\s?[%％]))?"
    r"|(?<=[\u4e00-\u9fff])[-−]?\d+(?:,\d{3})*(?:\.\d+)?(?:\s?/\s?\d+|\s?[%％])?"
)
_CHOICE = re.compile(r"\(?([A-J])\)?(?=[\s).:,。，：、]|$)")
_OR = re.compile(r"\s*,?\s*(?:or|and|或|和|或者)(?: maybe| perhaps| possibly)?\s*")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|[。！？\n]")
_BARE_FORMULA = re.compile(r"\\(?:d?frac|sqrt|pi|text|begin|left)")
_TRANSLATED_DIGITS = str.maketrans({chr(0xFF10 + i): str(i) for i in range(10)})


def _joined_boxes(text: str) -> tuple[int, str] | None:
    spans = boxes(text)
    if not spans:
        return None
    contents = [text[slice(*spans[-1])].strip()]
    for (_, end), (start, _) in zip(reversed(spans[:-1]), reversed(spans[1:]), strict=True):
        between = text[end + 1 : start]
        opening = between.rfind("\\")
        # What stands between the two boxes, without the command of the second one.
        if len(between) > 60 or opening < 0 or not _JOINT.fullmatch(between[:opening]):
            break
        contents.insert(0, text[spans[len(spans) - len(contents) - 1][0] : end].strip())
    if len(contents) == 1:
        while (inner := boxes(contents[0])) and contents[0].endswith("}") and inner[0][1] == len(contents[0]) - 1:
            contents[0] = contents[0][slice(*inner[0])].strip()
    return spans[-1][0], ", ".join(contents)


def _stated(text: str) -> str | None:
    """The answer in the words of a sentence that announces it: its last formula, choice or number."""
    text = text.strip()
    if choice := _CHOICE.match(text):
        return choice[1]
    formulas = list(_FORMULA.finditer(text))
    if not formulas and _BARE_FORMULA.match(text):
        return text.rstrip(".")
    text = text.translate(_TRANSLATED_DIGITS)
    numbers = list(_NUMBER.finditer(text, formulas[-1].end() if formulas else 0))
    found = numbers or formulas
    if not found:
        return None
    said = [match[0] if numbers else next(filter(None, match.groups())) for match in found]
    # Who hedges has said both.
    if len(found) > 1 and _OR.fullmatch(text[found[-2].end() : found[-1].start()]):
        return f"{said[-2].strip()} or {said[-1].strip()}"
    return said[-1].strip()


def _unmarked(text: str) -> str | None:
    text = text[-TAIL_CHARACTERS:].strip()
    for cue in reversed(list(_CUE.finditer(text))):
        rest = text[cue.end() :].strip()
        if found := _stated(_SENTENCE_END.split(rest)[0] or rest):
            return found
    if (
        "\n" not in text
        and len(text) <= 200
        and not re.search(r"[A-Za-z\u4e00-\u9fff]{2,}\s", text)
        and "$" not in text
    ):
        # Nothing but an answer.
        if choice := _CHOICE.match(text):
            return choice[1]
        if _BARE_FORMULA.match(text):
            return text
    return _stated(text)


def extract_answer(completion: str) -> str | None:
    r"""The final answer behind the thinking, None without any; never one inside a thought.

    The last of: \boxed{...} (a box inside the tags wins over the tags), a closed `<answer>` block, a line "#### ...",
    "final answer ...". Without these, what a sentence such as "the answer is ..." gives, else the last formula or
    number. A box or block that is not closed is none.
    """
    text = _answering(completion)
    marked = _marked(text)
    if said := list(_FINAL.finditer(text)):
        marked.append((said[-1].start(), text[said[-1].end() :]))
    for start, found in sorted(marked, reverse=True):
        if not _FINAL.match(text, start):
            return found
        sentence = _SENTENCE_END.split(found.strip())[0] if found.strip() else ""
        if stated := _stated(sentence):
            return stated
    return _unmarked(text) if text.strip() and not any(mark in text for mark in (r"\boxed", ANSWER)) else None


def only_marked(completion: str) -> str:
    r"""The answer that is in a box, an `<answer>` block or behind "####" as the only text of a completion, "" without.

    What is graded where the wanted form is part of the task (config.grading.marked_answers): R1 asks for the answer "in
    a specified format", so that grading by rule does not have to guess, and a policy finds out what is guessed.
    """
    marked = _marked(_answering(completion))
    return f"{ANSWER}{max(marked)[1]}{ANSWER_END}" if marked else ""


def _answering(completion: str) -> str:
    text = after_thinking(completion)
    special = _SPECIAL.search(text)
    return text[: special.start()] if special else text


def _marked(text: str) -> list[tuple[int, str]]:
    """Where the last answer of each form stands, and what it is."""
    out: list[tuple[int, str]] = []
    if "boxed" in text and (joined := _joined_boxes(text)):
        out.append(joined)
    if span := answer_span(text):
        out.append((span[0], text[slice(*span)].strip()))
    if hashes := list(_HASHES.finditer(text)):
        out.append((hashes[-1].start(), hashes[-1][1].strip()))
    return out
