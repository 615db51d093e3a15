"""From graded groups to packed minibatches: advantages per group, then the random split, then the packing.

The order matters (R1 report, supplement on GRPO): the baseline is that of the whole group, whatever minibatch its
members end up in. Every array is aligned to the position that predicts the token.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from r1jax import grpo
from r1jax.packing import pack_groups, place, place_inputs
from r1jax.rollout import Group, Sample, as_array


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static sizes of a minibatch: rows of `row_tokens`, `rows` of them per microbatch."""

    row_tokens: int
    rows: int
    share_prompt: bool
    replay: bool


@dataclasses.dataclass(frozen=True)
class Trained:
    """A sample and what training needs to know of it."""

    sample: Sample
    advantage: float
    is_trained: bool


def with_advantages(
    groups: Sequence[Group], settings: grpo.GrpoConfig, max_completion_tokens: int
) -> list[list[Trained]]:
    """Advantages of each group, overlong completions handled as `settings.overlong` says."""
    rewards, is_trained = grpo.handle_overlong(
        settings.overlong,
        as_array(groups, lambda s: s.graded.reward),
        as_array(groups, lambda s: len(s.completion.tokens)).astype(np.int32),
        as_array(groups, lambda s: s.completion.stop == "length") > 0,
        max_completion_tokens,
        settings.overlong_soft_tokens,
    )
    advantage = np.asarray(grpo.advantages(rewards, settings.normalize_std, settings.std_ddof))
    return [
        [Trained(s, float(a), bool(t)) for s, a, t in zip(group, row, trained, strict=True)]
        for group, row, trained in zip(groups, advantage, np.asarray(is_trained), strict=True)
    ]


def split(items: Sequence[Trained], minibatches: int, seed: tuple[int, ...]) -> list[list[Trained]]:
    """A random split into minibatches of equal size; raises ValueError where it does not come out even."""
    if len(items) % minibatches:
        raise ValueError(
            f"{len(items)} completions do not split into config.rl.minibatches = {minibatches} equal parts"
        )
    order = np.random.default_rng(seed).permutation(len(items))
    return [[items[i] for i in part] for part in np.split(order, minibatches)]


def pack(
    items: Sequence[Trained], shape: Shape, settings: grpo.GrpoConfig, max_completion_tokens: int
) -> tuple[dict[str, np.ndarray], int]:
    """Arrays [M, B, T] of a minibatch, and how many of the M microbatches hold anything.

    M would be enough for one completion per row and so depends on the number of items alone: one program is compiled
    for all minibatches. The empty microbatches are not computed.
    """
    prompts: dict[tuple[int, ...], int] = {}
    for item in items:
        prompts.setdefault(item.sample.prompt_tokens, len(prompts))
    completions = [(prompts[i.sample.prompt_tokens], i.sample.completion.tokens) for i in items]
    rows = pack_groups([np.array(p) for p in prompts], completions, shape.row_tokens, shape.share_prompt, shape.rows)

    def spread(values: list[float], dtype: type) -> np.ndarray:
        """One value per completion at each of its targets, 0 elsewhere."""
        return np.where(rows.completion_index >= 0, np.array(values, dtype)[rows.completion_index], dtype(0))

    trained = [i for i in items if i.is_trained]
    tokens = sum(len(i.sample.completion.tokens) for i in trained)
    lengths = spread([len(i.sample.completion.tokens) if i.is_trained else 0 for i in items], np.int32)
    out = {
        "tokens": rows.tokens,
        "targets": rows.targets,
        "positions": rows.positions,
        "segments": rows.segments,
        "parents": rows.parents,
        "sequence": rows.segments,
        "is_completion": rows.is_completion & (lengths > 0),
        "advantage": spread([i.advantage for i in items], np.float32),
        "weights": grpo.token_weights(settings.aggregation, lengths, len(trained), tokens, max_completion_tokens),
        "sampler_logp": place(rows, [i.sample.completion.logp for i in items]),
    }
    if shape.replay:
        out["replay"] = place_inputs(rows, [i.sample.completion.experts for i in items], -1)
    n = len(rows.tokens) // shape.rows
    capacity = -(-len(items) // shape.rows)

    def stack(a: np.ndarray) -> np.ndarray:
        a = np.concatenate([a, np.zeros(((capacity - n) * shape.rows, *a.shape[1:]), a.dtype)])
        return a.reshape(capacity, shape.rows, *a.shape[1:])

    return {name: stack(a) for name, a in out.items()}, n
