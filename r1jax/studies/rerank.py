"""One answer out of several: by chance, likelihood, vote, or the scores of a model; how often it is right.

Best-of-n under a verifier: Cobbe et al. 2021 (arXiv 2110.14168); step scores brought together by their mean, least or
last one: Lightman et al. 2023 (arXiv 2305.20050), Math-Shepherd (arXiv 2312.08935).
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from r1jax.rollout import Sample

# Chances of success after each step of a completion to one score.
TOGETHER: dict[str, Callable[[np.ndarray], float]] = {
    "mean": lambda scores: float(scores.mean()),
    "least": lambda scores: float(scores.min()),
    "last": lambda scores: float(scores[-1]),
}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A whole completion as somebody sees it who cannot check it, and whether it is right."""

    answer: str | None
    is_right: bool
    tokens: int
    logp: float  # mean over its tokens
    scores: np.ndarray  # after each step


def candidate(s: Sample, scores: np.ndarray, measure: str) -> Candidate:
    """Of a graded sample."""
    is_right = s.graded.rewards[measure] > 0.5
    return Candidate(s.graded.answer, is_right, len(s.completion.tokens), float(s.completion.logp.mean()), scores)


def vote(candidates: Sequence[Candidate], weight: Callable[[Candidate], float]) -> bool:
    """Whether the answer of the greatest weight is right; the first of equals; nobody's answer is wrong."""
    votes: dict[str, float] = {}
    for c in candidates:
        if c.answer is not None:
            votes[c.answer] = votes.get(c.answer, 0.0) + weight(c)
    if not votes:
        return False
    chosen = max(votes, key=votes.__getitem__)
    return any(c.is_right for c in candidates if c.answer == chosen)


def methods() -> dict[str, Callable[[Sequence[Candidate]], float]]:
    """Ways to choose: from the candidates of a problem to how often what is chosen is right."""

    def best(by: Callable[[Candidate], float]) -> Callable[[Sequence[Candidate]], float]:
        return lambda candidates: float(max(candidates, key=by).is_right)

    return {
        "one at random": lambda candidates: float(np.mean([c.is_right for c in candidates])),
        "likeliest": best(lambda c: c.logp),
        "shortest": best(lambda c: -c.tokens),
        "majority": lambda candidates: float(vote(candidates, lambda c: 1.0)),
        **{f"best by {name} score": best(lambda c, f=f: f(c.scores)) for name, f in TOGETHER.items()},
        "vote by last score": lambda candidates: float(vote(candidates, lambda c: TOGETHER["last"](c.scores))),
        "any of them": lambda candidates: float(any(c.is_right for c in candidates)),
    }


def table(problems: Sequence[Sequence[Candidate]], sizes: Sequence[int]) -> dict[str, list[float]]:
    """How often each way is right with n candidates, for each n.

    A mean over all problems, and over as many draws of n from a problem's candidates as share none.
    """
    out: dict[str, list[float]] = {}
    for name, method in methods().items():
        out[name] = [
            float(np.mean([np.mean([method(c[i : i + n]) for i in range(0, len(c) - n + 1, n)]) for c in problems]))
            for n in sizes
        ]
    return out


def as_text(heading: str, sizes: Sequence[int], rows: dict[str, list[float]]) -> str:
    """The table for people."""
    width = max(map(len, [heading, *rows]))
    lines = [heading.ljust(width) + "".join(f"{n:>8}" for n in sizes)]
    lines += [name.ljust(width) + "".join(f"{value:8.1%}" for value in values) for name, values in rows.items()]
    return "\n".join(lines) + "\n"
