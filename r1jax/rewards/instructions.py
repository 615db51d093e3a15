"""Checks of verifiable instructions: the 25 constraints of IFEval (Zhou et al., 2023, arXiv 2311.07911, table 1).

Names and parameters are those of its public data, so that a record of it is an example as it is: `instruction_ids` and
`kwargs`. Where the published code needs nltk or langdetect, sentences are cut at their marks and the script decides;
for languages that share one, py3langid if it is installed.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from r1jax.rewards import language
from r1jax.rewards.form import after_thinking

CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_SENTENCE = re.compile(r"[^.!?。！？]+[.!?。！？]*")
_ABBREVIATED = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e)\.|(?<=\d)\.(?=\d)|\.{2,}")
_WORD = re.compile(r"\w+(?:['’\-]\w+)*")
_RELATIONS = ("less than", "at least")


def _relation(count: int, relation: str, limit: int) -> bool:
    return count < limit if relation == "less than" else count >= limit


def sentences(text: str) -> int:
    """How many sentences `text` has."""
    plain = _ABBREVIATED.sub(lambda m: m[0].replace(".", ""), text)
    return sum(bool(re.search(r"\w", part)) for part in _SENTENCE.findall(plain))


def _keyword(text: str, word: str) -> int:
    return len(re.findall(re.escape(word), text, re.IGNORECASE))


def _whole_word(text: str, word: str) -> bool:
    return bool(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE))


def _paragraphs(text: str) -> list[str] | None:
    """Of a text divided by ***; None if one in the middle is empty."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    return None if not all(parts[1:-1]) else [part for part in parts if part]


def _first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
    if len(paragraphs) != num_paragraphs or not 0 < nth_paragraph <= len(paragraphs):
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'\"").casefold()
    return re.split(r"[.,?!'\"]", word)[0] == first_word.casefold()


def _highlights(text: str) -> int:
    double = re.findall(r"\*\*[^\n*]+\*\*", text)
    single = re.findall(r"\*[^\n*]+\*", re.sub(r"\*\*[^\n*]+\*\*", " ", text))
    return sum(bool(found.strip("* ")) for found in [*double, *single])


def _is_json(text: str) -> bool:
    text = re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip(), flags=re.IGNORECASE)
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"\s?{re.escape(section_spliter)}\s?\d+\s?", text)) >= num_sections


def _postscript(text: str, postscript_marker: str) -> bool:
    letters = [letter for letter in postscript_marker.casefold() if letter.isalpha()]
    return bool(re.search(r"\s*" + r"\.\s?".join(map(re.escape, letters)) + r"(?:\.|\b).*$", text.casefold(), re.M))


def _two_responses(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    found = [part for part in parts if part]
    return all(parts[1:-1]) and len(found) == 2 and found[0] != found[1]


def _in_language(text: str, wanted: str) -> bool:
    if wanted in language.SCRIPTS:
        return language.consistency(text, wanted) > 0.5
    try:
        return language.identified_consistency(text, wanted) > 0.5
    except ValueError:
        return language.consistency(text, wanted) > 0.5


def _capital_words(text: str) -> int:
    return sum(word.isupper() for word in _WORD.findall(text))


def _letter_case(text: str, is_case: Callable[[str], bool]) -> bool:
    return is_case(text) and language.consistency(text, "en") > 0.5


def _ends(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').casefold().endswith(end_phrase.strip().casefold())


CHECKS: dict[str, Callable[..., bool]] = {
    "change_case:capital_word_frequency": lambda text, capital_relation, capital_frequency: _relation(
        _capital_words(text), capital_relation, capital_frequency
    ),
    "change_case:english_capital": lambda text: _letter_case(text, str.isupper),
    "change_case:english_lowercase": lambda text: _letter_case(text, str.islower),
    "combination:repeat_prompt": lambda text, prompt_to_repeat: (
        text.strip().casefold().startswith(prompt_to_repeat.strip().casefold())
    ),
    "combination:two_responses": _two_responses,
    "detectable_content:number_placeholders": lambda text, num_placeholders: (
        len(re.findall(r"\[[^\[\]]*\]", text)) >= num_placeholders
    ),
    "detectable_content:postscript": _postscript,
    "detectable_format:constrained_response": lambda text: any(option in text for option in CONSTRAINED),
    "detectable_format:json_format": _is_json,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:number_bullet_lists": lambda text, num_bullets: (
        len(re.findall(r"^\s*(?:\*(?!\*)|-)\s*[^\s*-].*$", text, re.MULTILINE)) == num_bullets
    ),
    "detectable_format:number_highlighted_sections": lambda text, num_highlights: _highlights(text) >= num_highlights,
    "detectable_format:title": lambda text: any(found.strip() for found in re.findall(r"<<([^\n<>]+)>>", text)),
    "keywords:existence": lambda text, keywords: all(_keyword(text, word) for word in keywords),
    "keywords:forbidden_words": lambda text, forbidden_words: not any(_whole_word(text, w) for w in forbidden_words),
    "keywords:frequency": lambda text, relation, keyword, frequency: _relation(
        _keyword(text, keyword.strip()), relation, frequency
    ),
    "keywords:letter_frequency": lambda text, let_relation, letter, let_frequency: _relation(
        text.casefold().count(letter.casefold()), let_relation, let_frequency
    ),
    "language:response_language": lambda text, language: _in_language(text, language),
    "length_constraints:nth_paragraph_first_word": _first_word,
    "length_constraints:number_paragraphs": lambda text, num_paragraphs: (
        (found := _paragraphs(text)) is not None and len(found) == num_paragraphs
    ),
    "length_constraints:number_sentences": lambda text, relation, num_sentences: _relation(
        sentences(text), relation, num_sentences
    ),
    "length_constraints:number_words": lambda text, relation, num_words: _relation(
        len(_WORD.findall(text)), relation, num_words
    ),
    "punctuation:no_comma": lambda text: "," not in text,
    "startend:end_checker": _ends,
    "startend:quotation": lambda text: len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"',
}


def _response(completion: str) -> str:
    text = after_thinking(completion).strip()
    return text.removeprefix("<answer>").removesuffix("</answer>").strip()


def followed(completion: str, example: Mapping[str, Any]) -> list[bool]:
    """For each instruction of the example whether the response, that is what follows the thought, follows it."""
    text = _response(completion)
    return [
        bool(text) and CHECKS[name](text, **{key: value for key, value in given.items() if value is not None})
        for name, given in zip(example["instruction_ids"], example["kwargs"], strict=True)
    ]


def grade(completion: str, example: Mapping[str, Any]) -> bool:
    """True if every instruction is followed: IFEval's strict accuracy of a prompt."""
    return all(followed(completion, example))


def followed_share(prompt: str, completion: str, example: Mapping[str, Any], **context: Any) -> float:
    """The share of the example's instructions that are followed: IFEval's strict accuracy of instructions."""
    verdicts = followed(completion, example)
    return sum(verdicts) / len(verdicts)


def answer(completion: str, example: Mapping[str, Any]) -> str | None:
    """Free texts are not voted on."""
    return None


def check_example(example: Mapping[str, Any]) -> None:
    """Raises ValueError that names the record and the field if an instruction is unknown or lacks a parameter."""
    names, given, where = (
        example.get("instruction_ids"),
        example.get("kwargs"),
        f"example {example.get('id')!r}: field ",
    )
    if not isinstance(names, list) or not names:
        raise ValueError(f"{where}'instruction_ids' is {names!r:.80}, wanted a list of instructions")
    if not isinstance(given, list) or len(given) != len(names) or not all(isinstance(one, Mapping) for one in given):
        raise ValueError(f"{where}'kwargs' is {given!r:.80}, wanted one object for each of {len(names)} instructions")
    for name, one in zip(names, given, strict=True):
        if name not in CHECKS:
            raise ValueError(f"{where}'instruction_ids' has {name!r}, wanted of {', '.join(CHECKS)}")
        parameters = {key: value for key, value in one.items() if value is not None}
        wanted = set(CHECKS[name].__code__.co_varnames[1 : CHECKS[name].__code__.co_argcount])
        if parameters.keys() != wanted:
            raise ValueError(f"{where}'kwargs' of {name} has {sorted(parameters)}, wanted {sorted(wanted)}")
        for key, value in parameters.items():
            kind = _kind(key)
            unrelated = key.endswith("relation") and value not in _RELATIONS
            if isinstance(value, bool) or not isinstance(value, kind) or unrelated:
                raise ValueError(f"{where}'kwargs' of {name}: {key} is {value!r:.80}, wanted {kind.__name__}")


def _kind(parameter: str) -> type:
    if parameter in ("keywords", "forbidden_words"):
        return list
    return int if parameter.startswith(("num_", "nth_")) or parameter.endswith("frequency") else str
