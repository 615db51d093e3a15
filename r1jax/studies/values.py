"""Models that value positions, which all three studies need: the policy's architecture with a scalar head.

PPO's value model, a process reward model and the value model of a tree search differ in what they are taught alone.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from r1jax import hosts, next_token, scorers, sharding, updates
from r1jax.packing import pack_groups, place
from r1jax.run import Config, Policy, Run, open_checkpoints, optim_config, put_rows
from r1jax.types import Params

# Prompt ids and completion ids, read together.
Read = tuple[Sequence[int], Sequence[int]]
# The logits of the value, [C] float32 each, after every token of each completion.
Valuer = Callable[[Sequence[Read]], list[np.ndarray]]


def explained(sums: Mapping[str, jax.Array]) -> jax.Array:
    """Share of the targets' variance that the values explain: 1 at best, 0 for their mean, below 0 for worse."""
    n = jnp.maximum(sums["tokens"], 1.0)
    variance = sums["target_squared"] / n - (sums["target"] / n) ** 2
    return 1.0 - sums["error_squared"] / n / jnp.maximum(variance, 1e-9)


def cross_entropy(values: jax.Array, micro: updates.Batch) -> jax.Array:
    """Of the logits of a chance of success, whose targets lie in 0..1 (shares of continuations that succeed)."""
    return optax.sigmoid_binary_cross_entropy(values, jnp.where(micro["is_valued"], micro["target"], 0.0))


def rows_of(reads: Sequence[Read], targets: Sequence[np.ndarray], length: int) -> dict[str, np.ndarray]:
    """Prompts with their completions packed into rows [B, T] of the arrays that a value model reads.

    What stands at a position has read the token before the target, so a value after token i stands where token i + 1
    would be predicted: a token that is not read (0) is appended to each completion.

    Args:
        targets: one number [C] for each token of each completion, NaN where nothing is to be learned.

    Raises:
        ValueError: a prompt and completion that are longer than a row (config.rl.row_tokens).
    """
    prompts: dict[tuple[int, ...], int] = {}
    for prompt, _ in reads:
        prompts.setdefault(tuple(prompt), len(prompts))
    completions = [(prompts[tuple(prompt)], np.array([*ids, 0])) for prompt, ids in reads]
    rows = pack_groups([np.array(prompt) for prompt in prompts], completions, length, share_prompt=True)
    # The first position has read the prompt alone, before any token of the completion.
    target = place(rows, [np.array([np.nan, *one], np.float32) for one in targets], fill=np.nan)
    return {
        "tokens": rows.tokens,
        "positions": rows.positions,
        "segments": rows.segments,
        "parents": rows.parents,
        "is_valued": ~np.isnan(target),
        "target": np.nan_to_num(target),
        "completion_index": rows.completion_index,
        "offset": rows.offset,
    }


@dataclasses.dataclass(frozen=True)
class Teaching:
    """How a value model is taught: see config.value_model."""

    epochs: float
    learning_rate: float
    rows: int


def make_valuer(values: Callable, params: Params, size: int, row_tokens: int, layout: sharding.Layout) -> Valuer:
    """The scoring function of a value model; rows go through the device `size` at a time."""

    def valuer(reads: Sequence[Read]) -> list[np.ndarray]:
        out = [np.zeros(len(ids), np.float32) for _, ids in reads]
        rows = rows_of(reads, out, row_tokens)
        place_of, offset = rows.pop("completion_index"), rows.pop("offset")
        n = len(place_of)
        for start in range(0, n, size):
            part = {name: a[start : start + size] for name, a in rows.items()}
            filled = {name: np.pad(a, ((0, size - len(a)), (0, 0)))[None] for name, a in part.items()}
            found = hosts.fetch(values(params, put_rows(filled, layout), 1))[0][: len(part["tokens"])]
            here, at = place_of[start : start + size], offset[start : start + size]
            # Offset 0 has read the prompt alone.
            for row, column in zip(*np.nonzero((here >= 0) & (at > 0)), strict=True):
                out[here[row, column]][at[row, column] - 1] = found[row, column]
        return out

    return valuer


def teach(run: Run, config: Config, policy: Policy, reads: Sequence[Read], targets: Sequence[np.ndarray]) -> Valuer:
    """A value model taught from the policy's weights; see `rows_of` for the targets, shares of 0..1."""
    c, layout = Teaching(**config["value_model"]), run.layouts["train"]
    rows = rows_of(reads, targets, config["rl"]["row_tokens"])
    del rows["completion_index"], rows["offset"]
    steps = max(1, round(c.epochs * len(rows["tokens"]) / c.rows))
    settings = dataclasses.replace(
        optim_config(config), learning_rate=c.learning_rate, schedule="cosine", decay_steps=steps
    )
    program = scorers.head_program(config, policy, layout)
    optimizer, state, like = scorers.with_head(policy, layout, settings)

    def describe(sums: Mapping[str, jax.Array], learning_rate: float) -> dict[str, float]:
        found = {name: float(hosts.fetch(a)) for name, a in sums.items() if a.ndim == 0}
        return {"loss/mean": found["loss"], "grad/norm": found["optim/grad_norm"], "optim/lr": learning_rate}

    params = next_token.run_steps(
        run, state, like, updates.make_value_update(program, optimizer, cross_entropy), settings, rows,
        next_token.Schedule(steps, c.rows, 0, 0), open_checkpoints(run, config["checkpoint"]), describe, None,
    )  # fmt: skip
    return make_valuer(updates.make_values(program), params, c.rows, config["rl"]["row_tokens"], layout)
