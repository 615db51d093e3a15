"""Reward models on device: training on rows, keeping, and scoring; the policy's architecture with a scalar head."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from absl import logging

from r1jax import hosts, next_token, optim, preference, sharding, updates
from r1jax.folders import folder_at
from r1jax.model import convert
from r1jax.run import (
    Config,
    Policy,
    Run,
    open_checkpoints,
    optim_config,
    param_shardings,
    put_rows,
    training_program,
    write_model,
)
from r1jax.types import Params

HEAD = "score.safetensors"  # beside the trunk's weights: "score.weight" [1, D], as transformers names it


def correlation(scores: np.ndarray, lengths: np.ndarray) -> float:
    """Pearson's correlation of score and length, 0 where one of them does not vary."""
    if min(scores.std(), lengths.std()) < 1e-9:
        return 0.0
    return float(np.corrcoef(scores, lengths)[0, 1])


def describe(sums: Mapping[str, jax.Array], learning_rate: float) -> dict[str, float]:
    """Standard names of one update of a reward model."""
    s = {name: float(hosts.fetch(value)) for name, value in sums.items() if value.ndim == 0}
    return {
        "loss/mean": s["loss"],
        "accuracy/preference": s["right"] / max(s["rows"], 1.0),
        "grad/norm": s["optim/grad_norm"],
        "optim/lr": learning_rate,
    }


def head_program(config: Config, policy: Policy, layout: sharding.Layout) -> updates.Program:
    """What the programs of a model with a scalar head share; all of its weights are trained.

    Raises:
        ValueError: the policy has adapters.
    """
    if policy.lora is not None:
        raise ValueError(
            f"config.lora.rank is {policy.lora.rank}: a model with a scalar head needs all weights, set it to 0"
        )
    return dataclasses.replace(training_program(config, policy, layout), router_bias_rate=0.0)


def with_head(
    policy: Policy, layout: sharding.Layout, settings: optim.OptimConfig
) -> tuple[optim.Optimizer, updates.State, updates.State]:
    """The optimizer and state before the first step of the policy's weights with a head of zeros, and its shapes."""
    lies = {"trunk": param_shardings(policy.config, layout), "score": layout.sharding()}
    # A copy: the state is donated, and the policy lives on.
    params = {"trunk": jax.tree.map(jnp.copy, policy.params), "score": jnp.zeros(policy.config.hidden_size)}
    optimizer = optim.make_optimizer(settings, params)
    lies = updates.state_shardings(lies, optimizer, params, layout.sharding(), settings.moments_on)
    state = jax.jit(partial(updates.init_state, optimizer=optimizer), out_shardings=lies)(params)
    return optimizer, state, sharding.laid_out(state, lies)


def batches(rows: Mapping[str, np.ndarray], size: int, layout: sharding.Layout) -> updates.Batch:
    """Rows [N, T] as a minibatch [M, size, T] on the mesh, filled up with empty rows."""
    n = len(rows["tokens"])
    m = -(-n // size)
    return put_rows(
        {name: np.pad(a, ((0, m * size - n), (0, 0))).reshape(m, size, -1) for name, a in rows.items()}, layout
    )


def train(
    run: Run,
    config: Config,
    policy: Policy,
    loss: str,
    rows: Mapping[str, np.ndarray],
    valid: Mapping[str, np.ndarray],
) -> tuple[Params, np.ndarray]:
    """Trains a reward model from the policy's weights; its parameters and the scores of the validation rows.

    Args:
        loss: of updates.REWARD_LOSSES; for "pairwise" arrays are [N, 2, T], chosen first, else [N, 1, T].
    """
    c, layout = config["preference"], run.layouts["train"]
    program = head_program(config, policy, layout)
    per_item = rows["tokens"].shape[1]
    items = c["rows"] // per_item
    steps = max(1, round(c["epochs"] * len(rows["tokens"]) / items))
    settings = optim_config(config, steps)
    optimizer, state, like = with_head(policy, layout, settings)
    score = updates.make_reward_score(program)
    flat = {name: a.reshape(-1, a.shape[-1]) for name, a in valid.items()}
    held_out = batches(flat, c["rows"], layout)

    def scores_of(params: Params) -> np.ndarray:
        return hosts.fetch(score(params, held_out)).reshape(-1)[: len(flat["tokens"])]

    def validate(params: Params) -> dict[str, float]:
        return measured(scores_of(params), loss, flat)

    schedule = next_token.Schedule(steps, items, c["valid_every"], 0, (c["microbatch_rows"] or c["rows"]) // per_item)
    params = next_token.run_steps(
        run, state, like, updates.make_reward_update(program, optimizer, loss), settings, rows, schedule,
        open_checkpoints(run, config["checkpoint"]), describe, validate,
    )  # fmt: skip
    return params, scores_of(params)


def measured(scores: np.ndarray, loss: str, rows: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Accuracy on held-out rows [N, T] and the correlation of score and length."""
    if loss == "pairwise":
        right = scores[0::2] > scores[1::2]
    else:
        right = (scores > 0) == (rows["label"].sum(1) > 0.5)
    lengths = (rows["segments"] > 0).sum(1).astype(float)
    return {"eval/accuracy": float(right.mean()), "eval/length_correlation": correlation(scores, lengths)}


def save(folder: pathlib.Path, policy: Policy, params: Params, report: Mapping[str, Any]) -> None:
    """Leaves a reward model: the trunk as a released-model folder, its head, and what was measured.

    Args:
        params: as arrays or `Lazy`.
    """
    write_model(folder, policy, params["trunk"])
    if hosts.is_writer():
        safetensors.numpy.save_file({"score.weight": np.asarray(params["score"][()])[None]}, folder / HEAD)
        hosts.atomic_write(folder / "report.json", json.dumps(dict(report), indent=1) + "\n")


def load(run: Run, config: Config, folder: pathlib.Path, policy: Policy) -> preference.Scorer:
    """The scoring function of a reward model in a folder; `policy` says how text becomes tokens.

    Raises:
        ValueError: there is no reward model, or it is of another tokenizer's size.
    """
    if not (folder / HEAD).exists():
        raise ValueError(f"{folder} holds no reward model ({HEAD} is missing): see config.preference.models")
    c, layout = config["preference"], run.layouts["train"]
    model, trunk = convert.load(folder_at(folder), layout.mesh, "float32")
    if model.vocab_size != policy.config.vocab_size:
        raise ValueError(f"{folder} knows {model.vocab_size} tokens, the policy {policy.config.vocab_size}")
    params = {"trunk": trunk, "score": jnp.asarray(safetensors.numpy.load_file(folder / HEAD)["score.weight"][0])}
    program = training_program(config, dataclasses.replace(policy, config=model, lora=None), layout)
    score = updates.make_reward_score(program)
    so_far = np.zeros(2, int)  # texts that were too long, and all

    def scorer(texts: Sequence[tuple[str, str]]) -> np.ndarray:
        """Between 0 and 1; 0.0 for what does not fit into config.preference.row_tokens."""
        rows, fits = preference.rows_of(texts, policy.tokenizer, config["data"]["template"], c["row_tokens"])
        so_far[:] += (~fits).sum(), len(fits)
        if not fits.all():
            logging.log_every_n(
                logging.WARNING, "%d of %d texts so far are longer than config.preference.row_tokens and score 0.0",
                100, *so_far,
            )  # fmt: skip
        found = hosts.fetch(score(params, batches(rows, c["rows"], layout))).reshape(-1)[: len(texts)]
        return np.where(fits, 1.0 / (1.0 + np.exp(-found.astype(np.float64))), 0.0)

    return scorer
