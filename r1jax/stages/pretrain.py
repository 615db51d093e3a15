"""Pretraining of a small base: next-token and multi-token prediction, experts balanced by bias (arXiv 2412.19437).

This is how the base that is packaged with r1jax was made (configs/pretrain.py).
"""

import hashlib
import json
import pathlib

import numpy as np
from ml_collections import ConfigDict

from r1jax import next_token, optim, updates
from r1jax.packing import Rows, pack_documents
from r1jax.run import Policy, Run, export, open_checkpoints, paths

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


def stage(run: Run, config: ConfigDict, policy: Policy) -> Policy:
    """Trains from random weights; leaves a released-model folder in WORKDIR/model."""
    c, eos = config.pretrain, policy.tokenizer.eos_id
    program = updates.Program(
        config=policy.config,
        layout=run.layouts["train"],
        compute_dtype=config.model.compute_dtype,
        remat=config.model.remat,
        scan_unroll=config.model.scan_unroll,
        paths=paths(config),
        router_bias_rate=config.optim.router_bias_rate,
        mtp_weight=c.mtp_weight,
    )
    params = next_token.train(
        run,
        STAGE,
        policy,
        program,
        optim.OptimConfig(**{k: v for k, v in config.optim.items() if k != "router_bias_rate"}),
        read_corpus(c.corpus, eos, c.row_tokens, "config.pretrain.corpus"),
        read_corpus(c.valid_corpus, eos, c.row_tokens, "config.pretrain.valid_corpus"),
        next_token.Schedule(c.steps, c.rows, c.valid_every, c.valid_rows),
        open_checkpoints(run, STAGE, config.checkpoint),
    )
    return export(run, policy, params)
