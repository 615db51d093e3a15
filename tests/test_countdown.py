"""The Countdown family: complete, solvable, split for good."""

import hashlib
import itertools
from collections import Counter

import pytest

from r1jax import countdown
from r1jax.countdown import LARGEST_INTERMEDIATE, Problem, all_problems, attempts, expression_of


def brute_force(numbers: tuple[int, ...]) -> set[int]:
    """Every result of two steps within 0..LARGEST_INTERMEDIATE, found without the module."""

    def step(a: int, b: int) -> set[int]:
        return {v for v in (a + b, a - b, b - a, a * b) if 0 <= v <= LARGEST_INTERMEDIATE}

    return {r for a, b, c in itertools.permutations(numbers) for middle in step(a, b) for r in step(middle, c)}


def test_the_family_is_every_reachable_target_of_every_multiset():
    targets: dict[tuple[int, ...], set[int]] = {}
    for problem in all_problems():
        targets.setdefault(problem.numbers, set()).add(problem.target)
    assert sum(map(len, targets.values())) == len(all_problems())
    for numbers in itertools.combinations_with_replacement(range(1, 21), 3):
        assert targets[numbers] == {t for t in brute_force(numbers) if 1 <= t <= 99}


def test_attempts_stay_in_range_use_each_number_once_and_mean_what_they_write():
    for numbers in list(itertools.combinations_with_replacement(range(1, 21), 3))[::9]:
        for attempt in attempts(numbers):
            assert sorted((attempt.first, attempt.second, attempt.rest)) == list(numbers)
            assert 0 <= attempt.middle <= LARGEST_INTERMEDIATE and 0 <= attempt.result <= LARGEST_INTERMEDIATE
            assert eval(expression_of(attempt)) == eval(expression_of(attempt, bare=True)) == attempt.result
        assert len({expression_of(a) for a in attempts(numbers)}) == len(attempts(numbers)) <= 27


def test_solutions_solve_whatever_the_order_of_the_numbers():
    assert countdown.solutions([7, 3, 5], 26) == countdown.solutions((3, 5, 7), 26) == ["(7*3)+5"]
    assert all(countdown.solutions(*problem) for problem in all_problems()[::50])
    assert countdown.solutions((1, 1, 1), 99) == []


def test_splits_are_disjoint_whole_large_enough_and_blind_to_order():
    problems = {name: set(countdown.problems_of(name)) for name in countdown.SPLITS}
    assert set().union(*problems.values()) == set(all_problems())
    assert sum(map(len, problems.values())) == len(all_problems())
    assert min(map(len, problems.values())) >= 1000
    share = {name: len(found) / len(all_problems()) for name, found in problems.items()}
    assert 0.55 < share["corpus"] < 0.63 and 0.23 < share["rl"] < 0.30
    for problem in all_problems()[::97]:
        for order in itertools.permutations(problem.numbers):
            assert countdown.split_of(Problem(order, problem.target)) == countdown.split_of(problem)


@pytest.mark.parametrize(
    ("split", "digest"),
    [
        ("corpus", "111d8cd38af79e6c"),
        ("rl", "b728cc194dee19b6"),
        ("validation", "29766ea024552345"),
        ("test", "98f0f262f557704d"),
    ],
)
def test_splits_never_change(split, digest):
    # The embedded base has learned from the first of these: a problem that moves would be an evaluation on seen data.
    ids = "\n".join(example["id"] for example in countdown.problems(split))
    assert hashlib.sha256(ids.encode()).hexdigest()[:16] == digest


def test_levels_follow_rarity_and_are_about_quarters():
    family = all_problems()[::11]
    level = {problem: countdown.level_of(problem) for problem in family}
    levels = Counter(level.values())
    assert set(levels) == {1, 2, 3, 4} and min(levels.values()) > 0.2 * len(family)
    share = {p: len(countdown.solutions(*p)) / len(attempts(p.numbers)) for p in family}
    means = [sum(share[p] for p in family if level[p] == n) / levels[n] for n in (1, 2, 3, 4)]
    assert means == sorted(means, reverse=True)


def test_an_example_says_what_it_asks():
    example = countdown.example_of(Problem((3, 5, 7), 26))
    assert example["question"] == "Using 3, 5, 7 and + - *, make 26."
    assert example["answer"] == {"numbers": [3, 5, 7], "target": 26}
    assert (example["id"], example["grader"]) == ("countdown-3-5-7-26", "countdown")


def test_the_first_problems_of_a_split_are_a_fair_sample():
    problems = countdown.problems("test")
    mean = sum(p["answer"]["target"] for p in problems) / len(problems)
    assert abs(sum(p["answer"]["target"] for p in problems[:500]) / 500 - mean) < 3  # standard error 1


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match=r"'dev'.*config\.data\.split.*validation"):
        countdown.problems("dev")
