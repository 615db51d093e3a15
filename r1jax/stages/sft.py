"""Supervised fine-tuning on conversations, packed, with the loss on completions only.

Cold start, rejection sampling and distillation end with it (R1 report, sections 2.3.1, 2.3.3 and 2.4): two or three
epochs, a cosine from 5e-5 to a tenth (configs/sft.py).
"""

import dataclasses

from ml_collections import ConfigDict

from r1jax import conversations, hosts, next_token, optim, updates
from r1jax.run import Policy, Run, export, open_checkpoints, paths

STAGE = "sft"


def stage(run: Run, config: ConfigDict, policy: Policy) -> Policy:
    """Trains the policy on config.sft.data; leaves a released-model folder in WORKDIR/model."""
    c = config.sft

    def read(key: str) -> conversations.Packed:
        name = f"config.sft.{key}"
        return conversations.read(c[key], name, policy.tokenizer, config.data.template, c.row_tokens)

    given, valid = read("data"), read("valid_data") if c.valid_data else None
    steps = max(1, round(c.epochs * len(given.rows.tokens) / c.rows))
    left_out = f"; {given.too_long} that are longer than a row are left out" if given.too_long else ""
    hosts.say(
        f"{given.conversations:,} conversations in {len(given.rows.tokens):,} rows of {c.row_tokens:,} tokens, "
        f"{c.epochs:g} epochs of them in {steps:,} steps{left_out}"
    )
    settings = optim.OptimConfig(**{k: v for k, v in config.optim.items() if k != "router_bias_rate"})
    program = updates.Program(
        config=policy.config,
        layout=run.layouts["train"],
        compute_dtype=config.model.compute_dtype,
        remat=config.model.remat,
        scan_unroll=config.model.scan_unroll,
        paths=paths(config),
        router_bias_rate=config.optim.router_bias_rate,
        lora=policy.lora,
    )
    params = next_token.train(
        run,
        STAGE,
        policy,
        program,
        dataclasses.replace(settings, decay_steps=settings.decay_steps or steps),
        given.rows,
        valid.rows if valid else None,
        next_token.Schedule(steps, c.rows, c.valid_every, c.valid_rows, c.microbatch_rows),
        open_checkpoints(run, STAGE, config.checkpoint),
    )
    return export(run, policy, params)
