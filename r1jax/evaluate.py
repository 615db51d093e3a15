"""pass@1 as a mean over k samples, pass@k without bias, majority vote, with confidence intervals.

pass@k: Chen et al. 2021 (arXiv 2107.03374), equation 1. cons@k: the R1 report's majority vote (section 2.2.4).
"""

import collections
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from r1jax import hosts
from r1jax.rewards.language import language_of
from r1jax.rollout import Group, as_array, majority_is_right
from r1jax.text import REFLECTIVE_WORDS, reflective_counts, reflective_words
from r1jax.votes import sample_counts, vote_right


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that one of k samples, drawn from `samples` of which `correct` are right, is right."""
    if samples - correct < k:
        return 1.0
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def interval(values: np.ndarray) -> tuple[float, float]:
    """95% confidence interval of a mean over problems (normal approximation), cut to 0..1."""
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.5
    return max(0.0, values.mean() - half), min(1.0, values.mean() + half)


def curves_by_k(groups: Sequence[Group], reward: str) -> dict[str, dict[str, float]]:
    """pass_at and cons_at: pass@k and the vote of k samples, means over problems, for several k up to all samples.

    Both are expectations over the choice of the k; equally common answers count their share, while cons_at_k takes the
    one that came up first.
    """
    ks = sample_counts(len(groups[0]))
    passed, voted = [], []
    for group in groups:
        is_right = [s.graded.rewards[reward] > 0.5 for s in group]
        passed.append([pass_at_k(len(group), sum(is_right), k) for k in ks])
        answers = [s.graded.answer for s in group]
        counts = collections.Counter(answer for answer in answers if answer is not None)
        right = {answer for answer, one in zip(answers, is_right, strict=True) if one and answer is not None}
        voted.append(vote_right(counts, len(group) - counts.total(), right, ks))
    means = {"pass_at": np.mean(passed, 0), "cons_at": np.mean(voted, 0)}
    return {name: {str(k): float(value) for k, value in zip(ks, of, strict=True)} for name, of in means.items()}


def measure(groups: Sequence[Group], stage: str, step: int) -> dict[str, Any]:
    """The record of an evaluation: what summary.json keeps of it.

    Right is what the reward "accuracy" calls right, or the first reward where there is none of that name. Reflective
    words are English ones: a completion in another language has none.
    """
    names = list(groups[0][0].graded.rewards)
    name = "accuracy" if "accuracy" in names else names[0]
    right = as_array(groups, lambda s: s.graded.rewards[name]) > 0.5
    tokens = as_array(groups, lambda s: len(s.completion.tokens))
    k = right.shape[1]
    per_problem = right.mean(1)
    record: dict[str, Any] = {
        "stage": stage,
        "step": step,
        "n_problems": len(groups),
        "k": k,
        "pass_at_1": per_problem.mean(),
        "pass_at_1_ci": interval(per_problem),
        "cons_at_k": np.mean([majority_is_right(group, name) for group in groups]),
        "pass_at_k": np.mean([pass_at_k(k, int(row.sum()), k) for row in right]),
        **curves_by_k(groups, name),
        "mean_completion_tokens": tokens.mean(),
        "mean_tokens_right": tokens[right].mean() if right.any() else None,
        "mean_tokens_wrong": tokens[~right].mean() if (~right).any() else None,
        "truncated_share": as_array(groups, lambda s: s.completion.stop == "length").mean(),
        "reflective_per_completion": as_array(groups, lambda s: reflective_words(s.text)).mean(),
        "flagged_share": as_array(groups, lambda s: bool(s.graded.flags)).mean(),
    }
    for reward in names:
        record[f"{reward}_mean"] = as_array(groups, lambda s, r=reward: s.graded.rewards[r]).mean()
    for reward, standard in (("format", "format_share"), ("language", "language_consistency")):
        if reward in names:
            record[standard] = record.pop(f"{reward}_mean")
    levels = [group[0].example.get("level") for group in groups]
    record["by_level"] = {
        str(level): {
            "n_problems": len(rows),
            "pass_at_1": per_problem[rows].mean(),
            "mean_completion_tokens": tokens[rows].mean(),
        }
        for level in sorted({level for level in levels if level is not None})
        for rows in [[i for i, one in enumerate(levels) if one == level]]
    }
    record |= {"reflective_by_word": reflective_by_word(groups), "by_language": by_language(groups, right)}
    return {key: float(value) if isinstance(value, np.floating) else value for key, value in record.items()}


def reflective_by_word(groups: Sequence[Group]) -> dict[str, float]:
    """Each reflective word per completion: in the report "wait" comes late (supplement on the growth of reflection)."""
    counts = [reflective_counts(s.text) for group in groups for s in group]
    return {word: sum(one[word] for one in counts) / len(counts) for word in REFLECTIVE_WORDS}


def by_language(groups: Sequence[Group], right: np.ndarray) -> dict[str, dict[str, float]]:
    """pass@1 of the problems of each language, which is that of the question; `right` is [N, G]."""
    languages = [language_of(str(group[0].example.get("question", ""))) for group in groups]
    rows = {name: [i for i, one in enumerate(languages) if one == name] for name in sorted(set(languages))}
    return {name: {"n_problems": len(found), "pass_at_1": float(right[found].mean())} for name, found in rows.items()}


def preference(groups: Sequence[Group]) -> dict[str, float]:
    """The mean of the reward models' scores, where they have scored."""
    names = [name for name in ("helpful", "safe") if name in groups[0][0].graded.rewards]
    scores = [as_array(groups, lambda s, n=name: s.graded.rewards[n]).mean() for name in names]
    return {"preference": float(np.mean(scores))} if names else {}


def measure_general(groups: Sequence[Group]) -> dict[str, Any]:
    """What is kept of an evaluation on general instructions: the reward "worth" of every sample, and means."""
    worths = as_array(groups, lambda s: s.graded.rewards["worth"])
    return preference(groups) | {
        "general_worth": float(worths.mean()),
        "general_tokens": float(as_array(groups, lambda s: len(s.completion.tokens)).mean()),
        "general_worths": worths.tolist(),
    }


def win_rate(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """How often one of our samples is worth more than one of theirs of the same instruction; a tie counts half."""
    rates = []
    for mine, other in zip(ours, theirs, strict=True):
        difference = np.subtract.outer(np.asarray(mine), np.asarray(other))
        rates.append(((difference > 0) + 0.5 * (difference == 0)).mean())
    return float(np.mean(rates))


def add_win_rates(evals: Sequence[dict[str, Any]], baseline: str) -> None:
    """Adds general_win_rate, against the last evaluation of the stage `baseline`, to every record that can have it.

    One that was measured on other instructions has none; it is named.
    """
    measured = [record for record in evals if "general_worths" in record]
    against = [record for record in measured if record["stage"] == baseline]
    for record in measured if against else ():
        ours, theirs = ((r.get("general_digest"), r["general_worths"]) for r in (record, against[-1]))
        record.pop("general_win_rate", None)
        if ours[0] == theirs[0] and len(ours[1]) == len(theirs[1]):
            record["general_win_rate"] = win_rate(ours[1], theirs[1])
        else:
            hosts.say(
                f"{record['stage']}, step {record['step']}: no win rate against {baseline}, whose general instructions "
                "were others (config.eval.general)"
            )
