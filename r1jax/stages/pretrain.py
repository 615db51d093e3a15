"""Pretraining of a small base: next-token and multi-token prediction, experts balanced by bias (arXiv 2412.19437).

This is how the base that is packaged with r1jax was made (configs/pretrain.py).
"""

import contextlib
import hashlib
import json
import pathlib
import time
from collections.abc import Mapping

import jax
import numpy as np
from ml_collections import ConfigDict

from r1jax import data, metrics, optim, updates
from r1jax.packing import Rows, pack_documents
from r1jax.run import Policy, Run, Stopped, check_finite, export, open_checkpoints, put_rows, training_state

STAGE = "pretrain"


def read_corpus(folder: str, eos_id: int, row_tokens: int, key: str) -> Rows:
    """The packed rows of a corpus folder.

    Raises:
        ValueError: no corpus there, or its tokens do not match its index.
    """
    path = pathlib.Path(folder)
    try:
        index = json.loads((path / "index.json").read_text("utf-8"))
        raw = (path / "tokens.bin").read_bytes()
    except OSError as error:
        raise ValueError(
            f"{key} is {folder!r}, which holds no corpus ({error}); make one: python -m r1jax.corpus --out=DIR"
        ) from error
    if hashlib.sha256(raw).hexdigest() != index["sha256"]:
        raise ValueError(f"{path / 'tokens.bin'} is not what its index.json says; make the corpus of {key} again")
    tokens = np.frombuffer(raw, np.uint16).astype(np.int32)
    ends = np.flatnonzero(tokens == eos_id)
    return pack_documents(tokens, np.diff(np.concatenate([[-1], ends])), row_tokens)


def take(rows: Rows, index: np.ndarray) -> dict[str, np.ndarray]:
    """One minibatch [1, B, T] of the rows numbered."""
    return {name: array[index][None] for name, array in rows._asdict().items()}


def finish(sums: Mapping[str, jax.Array], learning_rate: float) -> dict[str, float]:
    """Standard metrics of a next-token step."""
    s = {name: np.asarray(value) for name, value in sums.items()}
    out = {
        "loss/mean": float(s["loss"]),
        "loss/next_token": float(s["nll"] / s["tokens"]),
        "entropy/mean": float(s["entropy"] / s["tokens"]),
        "grad/norm": float(s["optim/grad_norm"]),
        "optim/lr": learning_rate,
    }
    if "mtp_nll" in s:
        out["loss/mtp"] = float(s["mtp_nll"] / s["mtp_tokens"])
    if "load" in s:
        out["expert/load_max"] = float((s["load"].max(-1) / s["load"].mean(-1)).max())
    return out


def stage(run: Run, config: ConfigDict, policy: Policy) -> Policy:
    """Trains from random weights; leaves a released-model folder in WORKDIR/model."""
    c, layout = config.pretrain, run.layouts["train"]
    settings = optim.OptimConfig(**{k: v for k, v in config.optim.items() if k != "router_bias_rate"})
    program = updates.Program(
        config=policy.config,
        layout=layout,
        compute_dtype=config.model.compute_dtype,
        remat=config.model.remat,
        scan_unroll=config.model.scan_unroll,
        router_bias_rate=config.optim.router_bias_rate,
        mtp_weight=c.mtp_weight,
    )
    eos = policy.tokenizer.eos_id
    rows = read_corpus(c.corpus, eos, c.row_tokens, "config.pretrain.corpus")
    valid = read_corpus(c.valid_corpus, eos, c.row_tokens, "config.pretrain.valid_corpus")
    valid = put_rows(take(valid, np.arange(c.valid_rows)), layout)
    valid_tokens = float(np.asarray(valid["is_completion"]).sum())
    optimizer = optim.make_optimizer(settings, policy.params)
    update, score = updates.make_sft_update(program, optimizer), updates.make_score(program)
    rate = optim.schedule(settings)

    state, like = training_state(policy, layout, optimizer)
    with contextlib.ExitStack() as opened:
        saved = opened.enter_context(contextlib.closing(open_checkpoints(run, STAGE, config.checkpoint)))
        step = saved.latest() or 0
        if step:
            state, _ = saved.restore(step, like)
        log = opened.enter_context(contextlib.closing(metrics.Log(run.workdir, STAGE, step)))
        progress = opened.enter_context(contextlib.closing(metrics.Progress(STAGE, c.steps, step)))
        n = len(rows.tokens)
        while step < c.steps:
            start = time.perf_counter()
            places = np.arange(step * c.rows, (step + 1) * c.rows)
            index = np.array([data.order(n, run.seed, int(p) // n)[int(p) % n] for p in places])
            state, sums = update(state, put_rows(take(rows, index), layout), 1)
            step += 1
            scalars = finish(sums, float(rate(step - 1)))
            scalars["throughput/train_tokens_per_s"] = float(sums["tokens"]) / (time.perf_counter() - start)
            if step % c.valid_every == 0 or step == c.steps:
                logp = score(state["policy"], valid, 1)
                scalars["eval/next_token_loss"] = -float((logp * valid["is_completion"]).sum()) / valid_tokens
                progress.say(f"step {step}: validation loss {scalars['eval/next_token_loss']:.4f} nats per token")
            log.write(step, scalars)
            progress.step(step, scalars)
            check_finite(state["optim"], settings.non_finite_limit)
            if saved.due(step) or step == c.steps or run.stop.requested:
                saved.save(step, state, {})
            if run.stop.requested:
                raise Stopped
    return export(run, policy, state["policy"])
