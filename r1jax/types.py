"""Records that cross files, and the alphabet of axis letters used in every annotation.

B batch (rows or slots), T tokens of a row, S cache positions, D width, H heads, K key/value heads or experts per token,
E experts, F MLP width, V vocabulary, L layers, N prompts, G group.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

Example = dict[str, Any]  # at least id, question, answer, grader; see data.py
Params = dict[str, Any]  # nested dicts of arrays, layers stacked on a leading axis; see model/transformer.py


@dataclasses.dataclass(frozen=True)
class Request:
    """One completion to sample: `prompt` and `member` name its random draws, `tokens` its prompt ids.

    It ends after `max_tokens` at the latest, 0: when the call says.
    """

    prompt: int
    member: int
    tokens: tuple[int, ...]
    max_tokens: int = 0


@dataclasses.dataclass
class Completion:
    """One sampled completion with what the sampler knew of each of its tokens.

    tokens [C] include the stop token when one was drawn; logp [C] are natural logs under the sampling policy;
    experts [P + C - 1, L, K] are the experts chosen while prompt and completion were read (None for a dense policy, or
    where nobody asked for them).
    """

    prompt: int
    member: int
    tokens: np.ndarray
    logp: np.ndarray
    stop: str  # "stop" or "length"
    experts: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A leaf of a parameter tree that is read where it is indexed, so that a whole one need not fit into memory."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[tuple[int, ...]], np.ndarray]  # of the leading indices

    def __getitem__(self, place: tuple[int, ...]) -> np.ndarray:
        return self.read(tuple(map(int, place)))
