"""Worked solutions of Countdown problems as many writers of very different quality would leave them.

The raw material of the embedded base model: R1-Zero starts from a base that has read good and bad reasoning, and RL
finds the good (arXiv 2501.12948, section 2.2). Nearly half of the writers guess, some answer their first try, some give
up after a few, and a patient minority searches, takes back and checks until it is found. The mixture knows nothing of
the reward: the weights below are all there is, and many writers do not keep to the answer format. The tables and the
mixture are our choice.
"""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from r1jax.countdown import LARGEST_INTERMEDIATE, Attempt, Problem, attempts, expression_of, second_step
from r1jax.phrases import ENGLISH_ONLY, Voice, pick

SLIP_RATE = 0.01  # share of the equations that writers without patience get wrong
LONGEST_SEARCH = 12  # attempts
# Writers who try several times feel which attempts come near, though not which one hits: an attempt has weight
# (1 + |result - target| / NEAR) ** -INSIGHT to be next.
NEAR, INSIGHT = 15, 2.0

WELL_FORMED = " <think> {thought}</think> <answer>{answer}</answer>"
ILL_FORMED = {
    " {answer}": 3,
    " {thought}{answer}": 2,
    "{says}": 3,
    " <answer>{answer}</answer>": 3,
    " <think> {thought}</think> {answer}": 3,
    " <think> {thought}<answer>{answer}</answer>": 2,
    " <think> {thought}</think> <answer>{answer}": 3,
    WELL_FORMED + "{remark}": 3,
}


def search(problem: Problem, rng: random.Random, insight: float) -> Iterator[Attempt]:
    """Every attempt once, near ones sooner: a weighted draw without replacement, as a race of exponential clocks."""
    possible = attempts(problem.numbers)
    clocks = [rng.expovariate(1.0) * (1 + abs(a.result - problem.target) / NEAR) ** insight for a in possible]
    return (possible[i] for i in sorted(range(len(possible)), key=clocks.__getitem__))


def calculated(value: int, rng: random.Random, slip_rate: float) -> int:
    """What a writer gets for `value`; a slip is a miscounted unit or ten."""
    slip = rng.choice((-10, -1, 1, 10)) if rng.random() < slip_rate else 0
    return min(max(value + slip, 0), LARGEST_INTERMEDIATE)


def written_attempt(
    attempt: Attempt, target: int, separator: str, rng: random.Random, voice: Voice, slip_rate: float
) -> tuple[str, int]:
    """The two equations of an attempt and how far off they are, and what the writer believes to have reached.

    Whoever slips in the first goes on with the wrong number.
    """
    middle = calculated(attempt.middle, rng, slip_rate)
    left, right, result = second_step(middle, attempt.op2, attempt.rest)
    reached = calculated(result, rng, slip_rate)
    first = f"{attempt.first}{attempt.op1}{attempt.second}={middle}"
    second = f"{left}{attempt.op2}{right}={reached}"
    of, off_by = voice.say(rng, "target"), voice.say(rng, "distance")
    return f"{first}{separator}{second}{of}{target}{off_by}{abs(reached - target)}", reached


def guess(problem: Problem, rng: random.Random, voice: Voice) -> tuple[str, str]:
    """No calculation: some expression over the numbers, seldom with one of them used twice."""
    a, b, c = rng.sample(problem.numbers, 3)
    c = a if rng.random() < 0.04 else c
    op1, op2 = rng.choices("+-*", k=2)
    answer = f"({a}{op1}{b}){op2}{c}" if rng.random() < 0.75 else f"{a}{op1}({b}{op2}{c})"
    return voice.say(rng, "thoughts"), answer


def try_once(problem: Problem, rng: random.Random, voice: Voice) -> tuple[str, str]:
    """One attempt, answered whatever it gives."""
    attempt = next(search(problem, rng, insight=0.0))
    text, _ = written_attempt(attempt, problem.target, voice.say(rng, "separators"), rng, voice, SLIP_RATE)
    return text + voice.say(rng, "resignations"), expression_of(attempt, bare=rng.random() < 0.15)


def try_a_few(problem: Problem, rng: random.Random, voice: Voice) -> tuple[str, str]:
    """Two or three attempts; then the closest or the last one is the answer."""
    separator, miss, limit = voice.say(rng, "separators"), voice.say(rng, "misses"), rng.choice((2, 2, 3))
    thought, tried = "", []
    for _, attempt in zip(range(limit), search(problem, rng, INSIGHT), strict=False):
        text, reached = written_attempt(attempt, problem.target, separator, rng, voice, SLIP_RATE)
        tried.append((abs(reached - problem.target), attempt))
        if reached == problem.target:
            thought += text + voice.say(rng, "hits")
            break
        thought += text + miss
    else:
        thought += voice.say(rng, "surrenders")
    closest = reached == problem.target or rng.random() < 0.6
    _, attempt = min(tried, key=lambda pair: pair[0]) if closest else tried[-1]
    return thought, expression_of(attempt, bare=rng.random() < 0.15)


def search_patiently(problem: Problem, rng: random.Random, voice: Voice) -> tuple[str, str]:
    """Attempt after attempt, exactly, taking back what is not it, until the target is reached; then a check."""
    order = list(search(problem, rng, INSIGHT))
    results = [a.result for a in order]
    tried = order[: results.index(problem.target) + 1][-LONGEST_SEARCH:]
    separator, miss = voice.say(rng, "separators"), voice.say(rng, "misses")
    thought = voice.say(rng, "openings")
    for attempt in tried:
        text, reached = written_attempt(attempt, problem.target, separator, rng, voice, slip_rate=0.0)
        if reached == problem.target:
            thought += text + voice.say(rng, "hits")
        else:
            thought += text + (voice.say(rng, "retreats") if rng.random() < 0.5 else miss)
    answer = expression_of(tried[-1], bare=rng.random() < 0.15)
    check = voice.say(rng, "checks")
    return f"{thought}{check}{answer}={problem.target}. ", answer


class Writer(NamedTuple):
    """A kind of writer: its share of the documents, how often it keeps the format, and how it works."""

    share: float
    keeps_format: float
    work: Callable[[Problem, random.Random, Voice], tuple[str, str]]


WRITERS = {
    "blind": Writer(0.50, 0.67, guess),
    "one_try": Writer(0.22, 0.67, try_once),
    "few_tries": Writer(0.17, 0.85, try_a_few),
    "patient": Writer(0.11, 0.93, search_patiently),
}


def choose_writer(rng: random.Random) -> str:
    """A name of WRITERS, drawn by its share."""
    return pick(rng, {name: writer.share for name, writer in WRITERS.items()})


def worked_solution(
    problem: Problem, rng: random.Random, writer: str | None = None, voice: Voice = ENGLISH_ONLY
) -> str:
    """A completion for the problem's prompt by `writer`, or by one chosen at random.

    It begins with a space, as the prompt ends with a colon, and has no end-of-sequence mark.
    """
    _, keeps_format, work = WRITERS[writer or choose_writer(rng)]
    thought, answer = work(problem, rng, voice)
    form = WELL_FORMED if rng.random() < keeps_format else pick(rng, ILL_FORMED)
    return written(form, thought, answer, rng, voice)


def written(form: str, thought: str, answer: str, rng: random.Random, voice: Voice) -> str:
    """Thought and answer in one of the forms above."""
    remark, says = voice.say(rng, "remarks"), voice.say(rng, "answer").format(answer=answer)
    return form.format(thought=thought, answer=answer, remark=remark, says=says)
