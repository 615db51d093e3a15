"""Hostile texts for the math verifier: no exception, no long wait, the same verdict in both directions."""

import itertools
import resource

import pytest

from r1jax.rewards.pool import RewardPool
from tests.bench.fuzz import LIMIT_S, POISON, one, texts


@pytest.mark.parametrize("text", POISON, ids=range(len(POISON)))
def test_poison_is_graded_within_a_second(text):
    assert one(text, "5") < LIMIT_S


def test_random_texts_are_graded_within_a_second():
    for text in itertools.islice(texts(seed=7), len(POISON), len(POISON) + 100):
        assert one(text, "x+1") < LIMIT_S, text


@pytest.mark.slow
def test_the_memory_of_the_parent_is_flat_over_many_hostile_items():
    with RewardPool({"accuracy": 1.0}, 2, 5.0) as pool:
        after = []
        for ticket, text in enumerate(itertools.islice(texts(seed=3), 10_000)):
            pool.submit(ticket, "", rf"<think>so</think> \boxed{{{text}}}", {"grader": "math", "answer": "5"})
            if ticket % 1000 == 999:
                assert {flag for graded in pool.drain() for flag in graded.flags} <= {"timeout"}
                after.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    assert after[-1] - after[1] < 20.0, after  # MB
