"""The majority vote of k of n samples, its expectation over all choices of the k, without drawing any.

cons@k is the R1 report's majority vote (arXiv 2501.12948, section 2.2.4); that it can be had for every k from the same
n samples follows pass@k (Chen et al. 2021, arXiv 2107.03374). Equally common answers count their share.
"""

import math
from collections.abc import Collection, Mapping

import numpy as np


def sample_counts(n: int) -> list[int]:
    """The k at which n samples are looked at: powers of two up to n, and n."""
    return sorted({*(2**i for i in range(n.bit_length())), n} - {0})


def vote_right(counts: Mapping[str, int], silent: int, right: Collection[str], ks: Collection[int]) -> np.ndarray:
    """[K], the probability that the commonest answer of k samples, drawn without return, is right, for each k.

    Args:
        counts: how many samples gave each answer.
        silent: how many gave none; they take a place and have no vote.
        right: the answers that are right.
    """
    n = sum(counts.values()) + silent
    ways = np.zeros(n + 1)  # by k, the choices that a right answer wins
    for winner in right & counts.keys():
        for votes in range(1, counts[winner] + 1):
            # Polynomials in the number of samples chosen, [ties, chosen].
            chosen = np.zeros((1, n + 1))
            chosen[0, votes] = math.comb(counts[winner], votes)
            chosen = _times(chosen, [math.comb(silent, j) for j in range(silent + 1)])
            for answer, count in counts.items():
                if answer == winner:
                    continue
                fewer = [math.comb(count, j) for j in range(min(count + 1, votes))]
                below = _times(chosen, fewer)
                if count >= votes:
                    tied = _times(chosen, [0] * votes + [math.comb(count, votes)])
                    below, tied = np.pad(below, ((0, 1), (0, 0))), np.pad(tied, ((1, 0), (0, 0)))
                    below = below + tied
                chosen = below
            ways += (chosen / np.arange(1, len(chosen) + 1)[:, None]).sum(0)
    return np.array([ways[k] / math.comb(n, k) for k in ks])


def _times(rows: np.ndarray, polynomial: list[int]) -> np.ndarray:
    """Each row times a polynomial, cut to the rows' length."""
    out = np.zeros_like(rows)
    for power, coefficient in enumerate(polynomial):
        if coefficient:
            out[:, power:] += float(coefficient) * rows[:, : rows.shape[1] - power]
    return out
