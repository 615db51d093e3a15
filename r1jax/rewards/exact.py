"""Answers compared as text: multiple choice (MMLU, GPQA), exact match and F1 over words (SQuAD, DROP).

The normalisation and the bag-of-words F1 are those of DROP (Dua et al., 2019, arXiv 1903.00161, and its published
evaluation), which follows SQuAD: case, punctuation and articles do not count, numbers have to agree.
"""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from r1jax.rewards.final_answer import extract_answer, only_marked
from r1jax.rewards.form import after_thinking

LETTERS = "ABCDEFGHIJ"
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
# "A" and "I" are words as well: a letter only where no word follows on the line.
_ONE = r"(?:[B-HJ](?![\w'’])|(?!I\.e\.)[AI](?=[^\S\n]*(?:because\b|since\b|and not\b|[^\w\s'’]|[\u4e00-\u9fff]|\n|$)))"
_OPEN = r"(?:[*_$(（\[{]|\\(?:boxed|text|textbf|mathrm)\s*\{)*"
_LETTER = re.compile(rf"\W*(?:\\(?:text|mathrm|textbf)\s*\{{)?\s*\(?({_ONE})\)?(?:\}}|[\s).:,*_$。，：）]|$)")
_SAID = re.compile(
    rf"(?i:answer|option|choice|correct)[*_]*\s*(?i:is|would be)?\s*[:：]?[*_]*\s*{_OPEN}"
    rf"({_ONE}|(?<=[(\[{{])[a-j](?=[)\]}}]))|(?:答案|[故应]选|因此选|所以选)(?:[是为：:\s]|应该|选项?)*{_OPEN}([A-J])(?![A-Za-z])"
)
_STATED = re.compile(r"(?i:answer|option|choice)\s*(?:(?i:is|would be)\b|[:：])\s*([^\n.]+)")


def chosen_letter(completion: str) -> str | None:
    """The letter that a completion chooses: in its marked answer, else "answer is (B)", else all it says."""
    text, marked = after_thinking(completion), extract_answer(only_marked(completion))
    if marked is None and (said := _SAID.findall(text)):
        return (said[-1][0] or said[-1][1]).upper()
    found = text if marked is None else marked
    match = _LETTER.match(found)
    return match[1] if match and not re.search(r"\b[A-J]\b", found[match.end() :]) else None


def _gold_letter(example: Mapping[str, Any]) -> str:
    gold = example["answer"]
    return LETTERS[gold] if isinstance(gold, int) else gold.strip().strip("().").upper()


def grade_choice(completion: str, example: Mapping[str, Any]) -> bool:
    """True if the completion chooses the letter of the example, or gives the text of that choice and of no other."""
    letter, gold = chosen_letter(completion), _gold_letter(example)
    if letter is not None:
        return letter == gold
    stated = _STATED.findall(after_thinking(completion))
    found, choices = extract_answer(only_marked(completion)) or (stated and stated[-1]), example.get("choices")
    if not found or not choices:
        return False
    return [LETTERS[i] for i, choice in enumerate(choices) if normal(choice) == normal(found)] == [gold]


def answer_choice(completion: str, example: Mapping[str, Any]) -> str | None:
    """The letter chosen, for a vote."""
    return chosen_letter(completion)


def check_choice(example: Mapping[str, Any]) -> None:
    """Raises ValueError that names the record and the field if the gold is no choice or the choices are no texts."""
    gold, choices, where = example.get("answer"), example.get("choices"), f"example {example.get('id')!r}: field "
    if isinstance(gold, bool) or not isinstance(gold, str | int):
        raise ValueError(f"{where}'answer' is {gold!r}, wanted a letter or the number of a choice (the first is 0)")
    if choices is not None and not (isinstance(choices, Sequence) and all(isinstance(c, str) for c in choices)):
        raise ValueError(f"{where}'choices' is {choices!r:.80}, wanted a list of texts")
    count = len(choices) if choices else len(LETTERS)
    known = 0 <= gold < count if isinstance(gold, int) else _gold_letter(example) in tuple(LETTERS[:count])
    if not known:
        raise ValueError(f"{where}'answer' is {gold!r}, but the choices are {LETTERS[0]} to {LETTERS[count - 1]}")


def normal(text: str) -> str:
    """`text` without case, articles and punctuation, numbers in one spelling."""
    words = []
    for word in re.split(r"[\s\-]+", text.casefold()):
        try:
            words.append(str(float(word.replace(",", "").strip("$%.?!\"'"))))
        except ValueError:
            words.append("".join(c for c in word if c not in string.punctuation))
    return " ".join(_ARTICLES.sub(" ", " ".join(words)).split())


def f1(gold: str, found: str) -> float:
    """F1 over the sets of normalised words; 0.0 if the gold has numbers and none of them is in the answer."""
    gold_words, found_words = set(normal(gold).split()), set(normal(found).split())
    numbers = {word for word in gold_words if re.fullmatch(r"-?\d+\.\d+(?:e[+-]?\d+)?", word)}
    common = gold_words & found_words
    if not common or (numbers and not numbers & found_words):
        return 0.0
    precision, recall = len(common) / len(found_words), len(common) / len(gold_words)
    return 2 * precision * recall / (precision + recall)


def _golds(example: Mapping[str, Any]) -> list[str]:
    gold = example["answer"]
    return [str(one) for one in gold] if isinstance(gold, list | tuple) else [str(gold)]


def _found(completion: str) -> str | None:
    return extract_answer(completion) or after_thinking(completion).strip() or None


def grade_exact(completion: str, example: Mapping[str, Any]) -> bool:
    """True if the final answer is one of the golds after normalisation."""
    found = _found(completion)
    return found is not None and normal(found) in map(normal, _golds(example))


def best_f1(completion: str, example: Mapping[str, Any]) -> float:
    """The best `f1` of the final answer against the golds."""
    found = _found(completion)
    return max(f1(gold, found) for gold in _golds(example)) if found else 0.0


def answer_exact(completion: str, example: Mapping[str, Any]) -> str | None:
    """The normalised final answer, for a vote."""
    found = _found(completion)
    return normal(found) if found else None


def check_exact(example: Mapping[str, Any]) -> None:
    """Raises ValueError that names the record and the field if the gold is no text or number, or list of them."""
    gold = example.get("answer")
    for one in gold if isinstance(gold, list | tuple) and gold else [gold]:
        if isinstance(one, bool) or not isinstance(one, str | int | float) or not str(one).strip():
            raise ValueError(
                f"example {example.get('id')!r}: field 'answer' is {gold!r:.80}, wanted a text, a number or a list"
            )
