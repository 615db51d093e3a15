"""Laws of evaluation: pass@k against enumeration, the vote against a count, the interval against simulation."""

import itertools
import math

import numpy as np
import pytest
from tiny import made_sample

from r1jax import evaluate, rollout, votes
from r1jax.types import Completion


def group(answers: str, right: str, n: int = 4, **example) -> rollout.Group:
    """One sample per letter, "-" for no answer; right are the letters that earn the reward."""
    return [
        made_sample(
            (1, 2),
            Completion(0, member, np.ones(n + member, np.int32), np.zeros(n, np.float32), "stop"),
            reward=float(letter in right),
            answer=None if letter == "-" else letter,
            text="wait, but 1",
            **example,
        )
        for member, letter in enumerate(answers)
    ]


@pytest.mark.parametrize("samples", [1, 4, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(samples: int) -> None:
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        subsets = list(itertools.combinations(range(samples), k))
        want = np.mean([any(i < correct for i in subset) for subset in subsets])
        assert evaluate.pass_at_k(samples, correct, k) == pytest.approx(want)


@pytest.mark.parametrize(
    ("answers", "winner"), [("abb", "b"), ("abba", "a"), ("-b-", "b"), ("--", None), ("cab", "c"), ("a-bb-", "b")]
)
def test_majority_is_the_commonest_answer_and_the_first_among_equals(answers: str, winner: str | None) -> None:
    voters = group(answers, right="b")
    assert rollout.majority(voters) == winner
    assert rollout.majority_is_right(voters, "accuracy") == (winner == "b")


def test_pass_at_k_for_every_k_of_a_coin() -> None:
    """With c of n right, k draws all miss with the product of (n-c-i)/(n-i)."""
    for k in (1, 2, 16, 50):
        want = 1 - np.prod([(64 - 9 - i) / (64 - i) for i in range(k)])
        assert evaluate.pass_at_k(64, 9, k) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    ("answers", "right"),
    [("aabbc-", "a"), ("abcde", "ab"), ("aaab--", "b"), ("abab", "b"), ("---", "a"), ("aaaa", "a")],
)
def test_vote_of_k_is_the_mean_over_all_orders_of_all_choices(answers: str, right: str) -> None:
    """Brute force: every sequence of k samples, the commonest answer, the first among equals."""
    counts = {letter: answers.count(letter) for letter in set(answers) - {"-"}}
    ks = range(1, len(answers) + 1)
    found = votes.vote_right(counts, answers.count("-"), set(right), ks)
    for k, value in zip(ks, found, strict=True):
        drawn = list(itertools.permutations(answers, k))
        winners = [rollout.majority(group("".join(one), right)) for one in drawn]
        assert value == pytest.approx(np.mean([winner is not None and winner in right for winner in winners]))


def test_vote_of_two_answers_is_a_hypergeometric_tail() -> None:
    found = votes.vote_right({"a": 40, "b": 24}, 0, {"a"}, [1, 2, 33, 64])
    ways = [math.comb(40, j) * math.comb(24, 33 - j) for j in range(17, 34)]
    assert found == pytest.approx([40 / 64, 40 / 64, sum(ways) / math.comb(64, 33), 1.0], rel=1e-12)


def test_curves_by_k_end_at_the_whole_and_begin_at_pass_at_1() -> None:
    record = evaluate.measure([group("aabbb-", right="b"), group("abcdef", right="b")], "zero", 0)
    assert list(record["pass_at"]) == list(record["cons_at"]) == ["1", "2", "4", "6"]
    assert (
        record["pass_at"]["1"] == record["cons_at"]["1"] == pytest.approx(record["pass_at_1"]) == pytest.approx(1 / 3)
    )
    assert record["pass_at"]["6"] == record["pass_at_k"] == 1.0
    assert record["cons_at"]["6"] == pytest.approx((1 + 1 / 6) / 2)


def test_interval_holds_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    found = [evaluate.interval(rng.binomial(8, 0.3, 100) / 8) for _ in range(2000)]
    assert 0.93 < np.mean([low <= 0.3 <= high for low, high in found]) < 0.97
    for values in ([0.0, 0.0], [1.0, 1.0, 0.9], [1.0]):
        low, high = evaluate.interval(np.array(values))
        assert 0 <= low <= np.mean(values) <= high <= 1


def test_measure_counts_by_hand() -> None:
    groups = [group("aab", right="b", level=1), group("bbb", right="b", level=2), group("---", right="", level=2)]
    got = evaluate.measure(groups, "zero", 7)
    want = {
        "stage": "zero",
        "step": 7,
        "n_problems": 3,
        "k": 3,
        "pass_at_1": 4 / 9,
        "cons_at_k": 1 / 3,
        "pass_at_k": 2 / 3,
        "mean_completion_tokens": 5,
        "mean_tokens_right": (6 + 4 + 5 + 6) / 4,
        "mean_tokens_wrong": (4 + 5 + 4 + 5 + 6) / 5,
        "truncated_share": 0,
        "reflective_per_completion": 2,
        "accuracy_mean": 4 / 9,
    }
    assert {key: got[key] for key in want} == {k: pytest.approx(v) if k != "stage" else v for k, v in want.items()}
    assert got["pass_at_1_ci"][0] < 4 / 9 < got["pass_at_1_ci"][1]
    assert got["by_level"] == {
        "1": {"n_problems": 1, "pass_at_1": pytest.approx(1 / 3), "mean_completion_tokens": 5},
        "2": {"n_problems": 2, "pass_at_1": pytest.approx(1 / 2), "mean_completion_tokens": 5},
    }
    words = {word: count for word, count in got["reflective_by_word"].items() if count}
    assert words == {"wait": 1, "but": 1}


def test_problems_are_told_apart_by_the_language_of_their_question() -> None:
    asked = [("make 5 of 2 and 3", "aab"), ("用 2 和 3 凑出 5", "bbb"), ("凑出 6", "aaa")]
    groups = [group(answers, right="b", question=question) for question, answers in asked]
    assert evaluate.measure(groups, "zero", 7)["by_language"] == {
        "en": {"n_problems": 1, "pass_at_1": pytest.approx(1 / 3)},
        "zh": {"n_problems": 2, "pass_at_1": pytest.approx(1 / 2)},
    }
