"""What the writers of the embedded corpora say, in English and in Chinese, and the voice in which one writer says it.

Each table: a phrase and how often it is used, relative to the others. The tables are our choice. That a writer may mix
languages is what the language-consistency reward is there to undo (R1 report, section 2.3.2).
"""

import random
from typing import NamedTuple

ENGLISH = {
    "answer": {" the answer is {answer}.": 1},
    # A result beside the target, and how far off it is: small steps from which a small model tells hit from miss.
    "target": {" of ": 1},
    "distance": {", off by ": 1},
    "thoughts": {
        "I guess. ": 8,
        "I guess this is right. ": 5,
        "no idea, just a guess. ": 4,
        "this looks right. ": 4,
        "maybe this one. ": 3,
        "that is hard. ": 2,
        "easy. ": 2,
    },
    "separators": {", ": 6, "; ": 2, " then ": 2},
    "misses": {", no. ": 6, ", not it. ": 2, ". no, ": 2},
    "resignations": {". ": 6, ", fine. ": 2, ", good enough. ": 2},
    "surrenders": {
        "I give up. ": 3,
        "that is close. ": 3,
        "it must do. ": 2,
        "no time. ": 1,
        "however, I stop here. ": 1,
    },
    "openings": {"": 6, "let me try. ": 3, "step by step. ": 2},
    "retreats": {
        ", wait, that is not it. ": 9,
        ". wait, ": 4,
        ", but that is not it. ": 2,
        ". a mistake, retry. ": 1,
        ". however, ": 1,
    },
    "hits": {", yes. ": 5, ", that is it. ": 2, ", found it. ": 2},
    "checks": {"check: ": 7, "let me verify: ": 2, "check again: ": 1},
    "remarks": {" I hope so.": 3, " done.": 2, " or something else.": 1},
}

CHINESE = {
    "answer": {"答案是{answer}。": 1},
    "target": {"目标": 1},
    "distance": {"，相差": 1},
    "thoughts": {
        "我猜的。": 8,
        "我猜这个对。": 5,
        "不知道，随便猜。": 4,
        "看起来对。": 4,
        "也许是这个。": 3,
        "这题很难。": 2,
        "很容易。": 2,
    },
    "separators": {"，": 6, "；": 2, "然后": 2},
    "misses": {"，不对。": 6, "，不是。": 2, "。不行，": 2},
    "resignations": {"。": 6, "，行吧。": 2, "，够好了。": 2},
    "surrenders": {"我放弃。": 3, "很接近了。": 3, "只好这样。": 2, "没时间了。": 1, "但是，到此为止。": 1},
    "openings": {"": 6, "让我试试。": 3, "一步一步来。": 2},
    "retreats": {"，等等，这个不对。": 9, "。等等，": 4, "，但是这个不对。": 2, "。算错了，重来。": 1, "。不过，": 1},
    "hits": {"，对了。": 5, "，就是它。": 2, "，找到了。": 2},
    "checks": {"检查：": 7, "让我验证：": 2, "再检查：": 1},
    "remarks": {"希望对。": 3, "完成。": 2, "或者别的。": 1},
}

PHRASES = {"en": ENGLISH, "zh": CHINESE}


def pick(rng: random.Random, table: dict[str, float]) -> str:
    """A key of `table`, drawn by its weight."""
    return rng.choices(list(table), list(table.values()))[0]


class Voice(NamedTuple):
    """The languages that a writer uses: one throughout, or each phrase in any of several."""

    languages: tuple[str, ...]

    def say(self, rng: random.Random, table: str) -> str:
        """A phrase of the table."""
        language = self.languages[0] if len(self.languages) == 1 else rng.choice(self.languages)
        phrases = PHRASES[language][table]
        return next(iter(phrases)) if len(phrases) == 1 else pick(rng, phrases)


ENGLISH_ONLY = Voice(("en",))

# How writers of the bilingual corpus keep to the language of the question.
KEEPS_LANGUAGE = {"own": 0.5, "other": 0.15, "mixed": 0.35}


def choose_voice(rng: random.Random, language: str) -> Voice:
    """The voice of a writer who is asked in `language`, where the corpus has several."""
    other = next(one for one in PHRASES if one != language)
    return Voice({"own": (language,), "other": (other,), "mixed": (language, other)}[pick(rng, KEEPS_LANGUAGE)])
