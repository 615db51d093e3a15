"""Countdown with three numbers: the procedural task of the embedded default.

Reach a target by `+ - *` from three given numbers, each used exactly once. The game is the numbers round of the French
television programme "Des chiffres et des lettres"; as a task for R1-Zero in the small it was made known by TinyZero
(Pan et al., 2025). Every problem of the family is enumerated, and a hash of the problem says which split it is in, so
that a problem of the evaluation can never be in the corpus of the base model or among the prompts of the RL stage.
"""

import bisect
import functools
import hashlib
import itertools
from typing import Any, NamedTuple

LARGEST_NUMBER = 20
LARGEST_TARGET = 99
# Worked solutions never leave 0..LARGEST_INTERMEDIATE; the embedded tokenizer has one token for each of these numbers.
LARGEST_INTERMEDIATE = 199

OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}

# Cumulative shares of the hash range, in the order of the splits.
SPLITS = {"corpus": 0.58, "rl": 0.84, "validation": 0.92, "test": 1.0}

# A level ends where somebody who tries at random, never twice the same, needs this many attempts on average:
# about the quartiles over the family.
LEVEL_ENDS = (5.5, 8.0, 12.0)


class Problem(NamedTuple):
    """The numbers in ascending order, and the number to make of them."""

    numbers: tuple[int, int, int]
    target: int


class Attempt(NamedTuple):
    """Two steps that use every number once: `first op1 second = middle`, then middle and `rest` by `op2` = result."""

    first: int
    op1: str
    second: int
    middle: int
    op2: str
    rest: int
    result: int


def second_step(middle: int, op2: str, rest: int) -> tuple[int, int, int]:
    """Left side, right side and result of the second step; a difference is taken in its non-negative direction."""
    left, right = (rest, middle) if op2 == "-" and rest > middle else (middle, rest)
    return left, right, OPERATIONS[op2](left, right)


@functools.cache
def attempts(numbers: tuple[int, int, int]) -> tuple[Attempt, ...]:
    """All different attempts on sorted `numbers` whose steps stay within 0..LARGEST_INTERMEDIATE, at most 27.

    A sum or product is one attempt whatever the order of its sides, and a difference has only one direction.
    """
    found: dict[tuple[int, str, int, str], Attempt] = {}
    for i, j in itertools.combinations(range(3), 2):
        low, high, rest = numbers[i], numbers[j], numbers[3 - i - j]
        for op1, op2 in itertools.product(OPERATIONS, repeat=2):
            middle = OPERATIONS[op1](high, low)
            *_, result = second_step(middle, op2, rest)
            if max(middle, result) <= LARGEST_INTERMEDIATE:
                found.setdefault((high, op1, low, op2), Attempt(high, op1, low, middle, op2, rest, result))
    return tuple(found.values())


def expression_of(attempt: Attempt, bare: bool = False) -> str:
    """The attempt as one expression; `bare` leaves out parentheses where the usual precedence makes them redundant."""
    inner = f"{attempt.first}{attempt.op1}{attempt.second}"
    rest_first = attempt.op2 == "-" and attempt.rest > attempt.middle
    redundant = attempt.op1 == "*" or (attempt.op2 != "*" and not rest_first)
    inner = inner if bare and redundant else f"({inner})"
    return f"{attempt.rest}-{inner}" if rest_first else f"{inner}{attempt.op2}{attempt.rest}"


def solutions(numbers: tuple[int, ...] | list[int], target: int) -> list[str]:
    """The expressions of all attempts on `numbers` (in any order) that reach `target`."""
    return [expression_of(a) for a in attempts(tuple(sorted(numbers))) if a.result == target]


@functools.cache
def all_problems() -> tuple[Problem, ...]:
    """Every problem of the family: multisets of three numbers, and each target that some attempt reaches."""
    family = []
    for numbers in itertools.combinations_with_replacement(range(1, LARGEST_NUMBER + 1), 3):
        targets = sorted({a.result for a in attempts(numbers) if 1 <= a.result <= LARGEST_TARGET})
        family.extend(Problem(numbers, target) for target in targets)
    return tuple(family)


def _digest(problem: Problem) -> bytes:
    text = f"{','.join(map(str, sorted(problem.numbers)))}={problem.target}"
    return hashlib.sha256(text.encode()).digest()


def split_of(problem: Problem) -> str:
    """The split that a problem belongs to: "corpus", "rl", "validation" or "test"; the order of numbers is ignored."""
    share = int.from_bytes(_digest(problem)[:8], "big") / 2**64
    return next(name for name, end in SPLITS.items() if share < end)


@functools.cache
def problems_of(split: str) -> tuple[Problem, ...]:
    """The problems of a split in a fixed order without meaning, so that the first n are a fair sample."""
    if split not in SPLITS:
        raise ValueError(f"unknown countdown split {split!r}: config.data.split must be one of {', '.join(SPLITS)}")
    return tuple(sorted((p for p in all_problems() if split_of(p) == split), key=lambda p: _digest(p)[8:]))


def level_of(problem: Problem) -> int:
    """Difficulty 1 (easy) to 4, by the mean number of random attempts that it takes: rarer solutions are harder."""
    possible = attempts(problem.numbers)
    solving = sum(a.result == problem.target for a in possible)
    return 1 + bisect.bisect_right(LEVEL_ENDS, (len(possible) + 1) / (solving + 1))


QUESTIONS = {
    "en": "Using {numbers} and + - *, make {target}.",
    "zh": "用 {numbers} 和 + - * 凑出 {target}",
}


def question_of(problem: Problem, language: str = "en") -> str:
    """The question as it stands in every prompt and every document of the corpus."""
    return QUESTIONS[language].format(numbers=", ".join(map(str, problem.numbers)), target=problem.target)


def example_of(problem: Problem, language: str = "en") -> dict[str, Any]:
    """The problem as a record of a data set; "level" is its difficulty."""
    suffix = "" if language == "en" else f"-{language}"
    return {
        "id": f"countdown-{'-'.join(map(str, problem.numbers))}-{problem.target}{suffix}",
        "question": question_of(problem, language),
        "answer": {"numbers": list(problem.numbers), "target": problem.target},
        "grader": "countdown",
        "level": level_of(problem),
    }


def problems(split: str, languages: tuple[str, ...] = ("en",)) -> list[dict[str, Any]]:
    """The examples of a split, in the order of `problems_of`, in each language in turn.

    Raises:
      ValueError: `split` is not one of SPLITS.
    """
    return [example_of(one, languages[i % len(languages)]) for i, one in enumerate(problems_of(split))]
