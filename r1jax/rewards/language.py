"""The language of a thought: R1's language-consistency reward, and how often a thought reflects.

"The proportion of target language words in the CoT" (DeepSeek-R1, arXiv 2501.12948, section 2.3.2). Mathematics and
code belong to no language and are stripped first. Words are told apart by their script: Han characters count one each,
runs of letters of another script one word each. For languages that share a script, `py3langid` (optional) judges
sentences.
"""

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from r1jax.rewards.form import ANSWER, THINK, THINK_END, with_forced_thought
from r1jax.text import reflective_words

# The script of a language, as the first word of the Unicode names of its letters; Latin where it is not listed.
SCRIPTS = {
    "zh": "CJK", "ja": "CJK", "ko": "HANGUL", "ru": "CYRILLIC", "uk": "CYRILLIC", "bg": "CYRILLIC", "ar": "ARABIC",
    "fa": "ARABIC", "ur": "ARABIC", "he": "HEBREW", "el": "GREEK", "hi": "DEVANAGARI", "mr": "DEVANAGARI",
    "ne": "DEVANAGARI", "bn": "BENGALI", "pa": "GURMUKHI", "gu": "GUJARATI", "ta": "TAMIL", "te": "TELUGU",
    "kn": "KANNADA", "ml": "MALAYALAM", "th": "THAI", "ka": "GEORGIAN", "hy": "ARMENIAN",
}  # fmt: skip
# Japanese is written in its own two syllabaries as well.
_ALSO = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "IDEOGRAPHIC": "CJK"}
_OF_SCRIPT = {"CJK": "zh", "HANGUL": "ko", "CYRILLIC": "ru", "ARABIC": "ar", "HEBREW": "he", "GREEK": "el"} | {
    script: language for language, script in reversed(SCRIPTS.items()) if script not in ("CJK", "CYRILLIC", "ARABIC")
}

_NO_LANGUAGE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\)"
    r"|\\begin\{(\w+\*?)\}.*?\\end\{\1\}|\\[A-Za-z]+(?:\{[^{}]*\})*|</?(?:think|answer)>|https?://\S+",
    re.DOTALL,
)
# A name in a formula is no word: single letters, letters with digits.
_WORD = re.compile(r"[^\W\d_]+(?:['’\-][^\W\d_]+)*")


def _script(letter: str) -> str:
    name = unicodedata.name(letter, "").split(" ", 1)[0]
    return _ALSO.get(name, name)


def words_by_script(text: str) -> dict[str, int]:
    """How many words of each script stand in `text` without its mathematics and code; a Han character is a word."""
    counts: dict[str, int] = {}
    for match in _WORD.finditer(_NO_LANGUAGE.sub(" ", text)):
        word, at = match[0], 0
        while at < len(word):
            script = _script(word[at])
            end = at + 1
            while end < len(word) and (word[end] in "'’-" or _script(word[end]) == script):
                end += 1
            if script == "CJK":
                counts[script] = counts.get(script, 0) + end - at
            elif end - at > 1 or word[at] in "aAI":
                counts[script] = counts.get(script, 0) + 1
            at = end
    return counts


def language_of(prompt: str) -> str:
    """The language of a prompt by its commonest script: "zh", "en" for Latin letters and for none at all, ..."""
    counts = words_by_script(prompt)
    return _OF_SCRIPT.get(max(counts, key=counts.__getitem__), "en") if counts else "en"


def consistency(text: str, language: str) -> float:
    """The share of the words of `text` that are in the script of `language`; 1.0 where there are no words at all."""
    counts = words_by_script(text)
    total = sum(counts.values())
    return counts.get(SCRIPTS.get(language, "LATIN"), 0) / total if total else 1.0


def thought_of(completion: str) -> str:
    """What stands before the answer: the thought, closed or not; the whole text where no tag is."""
    text = completion.partition(THINK)[2] if THINK in completion else completion
    for tag in (THINK_END, ANSWER):
        text = text.partition(tag)[0]
    return text


def identified_consistency(text: str, language: str) -> float:
    """The share of sentences, by length, that `py3langid` takes for `language`: also for languages of one script.

    Raises:
      ValueError: py3langid is not installed.
    """
    try:
        import py3langid
    except ImportError:
        raise ValueError("config.rewards: 'language_id' needs py3langid: pip install 'r1jax[eval]'") from None
    sentences = [s.strip() for s in re.split(r"[.!?。！？\n]+", _NO_LANGUAGE.sub(" ", text)) if len(s.strip()) > 20]
    total = sum(map(len, sentences))
    return sum(len(s) for s in sentences if py3langid.classify(s)[0] == language) / total if total else 1.0


def _target(prompt: str, example: Mapping[str, Any]) -> str:
    # Not of the whole prompt, whose template is English whatever is asked.
    return example.get("language_of_answer") or language_of(str(example.get("question", prompt)))


def language_reward(prompt: str, completion: str, example: Mapping[str, Any], **context: Any) -> float:
    """The proportion of the thought's words that are in the language of the question, by script; 0.0 to 1.0."""
    return consistency(thought_of(with_forced_thought(prompt, completion)), _target(prompt, example))


def language_id_reward(prompt: str, completion: str, example: Mapping[str, Any], **context: Any) -> float:
    """As `language_reward`, judged sentence by sentence by py3langid; see `identified_consistency`."""
    return identified_consistency(thought_of(with_forced_thought(prompt, completion)), _target(prompt, example))


def reflection_count(prompt: str, completion: str, example: Mapping[str, Any], **context: Any) -> float:
    """How many reflective words the thought has (text.REFLECTIVE_WORDS): to be watched at weight 0.0, not rewarded."""
    return float(reflective_words(thought_of(with_forced_thought(prompt, completion))))
