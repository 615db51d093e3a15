"""Reasoning RL (R1 report, section 2.2): from the base, with accuracy and format as the only rewards, it is R1-Zero."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from ml_collections import ConfigDict

from r1jax import data, draw, grpo, held_out, hosts, loops, minibatches, optim, report, sharding, updates
from r1jax.rollout import collect, encode_prompts
from r1jax.run import (
    ROLLOUT,
    Policy,
    Run,
    check_lengths,
    export,
    make_verbs,
    open_checkpoints,
    open_pool,
    open_source,
    paths,
)
from r1jax.slots import Verbs
from r1jax.types import Example, Params

STAGE = "reasoning_rl"


@dataclasses.dataclass(frozen=True)
class Programs:
    """Everything jitted that the loop calls, and the settings that it was built by; r1jax.plan builds it too.

    Attributes:
        shape: of a minibatch.
        update, score, to_decode: as in loops.Moves.
    """

    settings: loops.RlConfig
    objective: grpo.GrpoConfig
    optimizing: optim.OptimConfig
    optimizer: Any
    shape: minibatches.Shape
    update: Callable
    score: Callable
    to_decode: Callable
    verbs: Verbs


def programs(config: ConfigDict, policy: Policy, layouts: dict[str, sharding.Layout]) -> Programs:
    """The programs of a run; of the policy's weights only shapes are looked at.

    Raises:
        ValueError: a setting that cannot be, or lengths that do not fit into a row or into the policy's context.
    """
    settings = loops.RlConfig(**{**config.rl, "length_schedule": tuple(map(tuple, config.rl.length_schedule))})
    objective = grpo.GrpoConfig(**config.grpo)
    optimizing = optim.OptimConfig(**{k: v for k, v in config.optim.items() if k != "router_bias_rate"})
    train, decode = layouts["train"], layouts["decode"]
    longest = settings.longest + config.data.max_prompt_tokens
    check_lengths(policy, config.data.max_prompt_tokens, settings.longest, settings.row_tokens)
    program = updates.Program(
        config=policy.config,
        layout=train,
        compute_dtype=config.model.compute_dtype,
        remat=config.model.remat,
        scan_unroll=config.model.scan_unroll,
        paths=paths(config),
        temperature=settings.temperature,
        router_bias_rate=config.optim.router_bias_rate,
        lora=policy.lora,
    )
    row_tokens = settings.row_tokens or -(-longest // 128) * 128
    n_rows = settings.microbatch_rows or -(-settings.prompts_per_update * settings.group_size * longest // row_tokens)
    optimizer = optim.make_optimizer(optimizing, policy.params)
    return Programs(
        settings,
        objective,
        optimizing,
        optimizer,
        minibatches.Shape(
            row_tokens,
            -(-n_rows // train.size("rows")) * train.size("rows"),
            settings.share_prompt,
            replay=settings.router_replay and policy.config.n_moe > 0,
        ),
        update=partial(updates.make_rl_update(program, objective, optimizer, row_tokens + 1), frozen=policy.frozen),
        score=partial(updates.make_score(program), frozen=policy.frozen),
        to_decode=loops.decode_layout(policy, decode, config.model.compute_dtype),
        verbs=make_verbs(config, policy, decode, draw.DrawConfig(temperature=settings.temperature)),
    )


def stage(run: Run, config: ConfigDict, policy: Policy) -> Policy:
    """Trains the policy by GRPO; leaves a released-model folder in WORKDIR/model and WORKDIR/report.html."""
    made = programs(config, policy, run.layouts)
    settings, verbs = made.settings, made.verbs
    key, max_prompt_tokens = jax.random.key(run.seed), config.data.max_prompt_tokens

    stream = data.PromptStream(open_source(config, config.data.source, config.data.split), run.seed)
    # Now rather than when its turn comes: a prompt that is too long.
    encode_prompts(stream.source.examples, config.data.template, policy.tokenizer, max_prompt_tokens)

    with open_pool(config) as pool:
        problems = held_out.prepare(run, STAGE, config, policy, pool, verbs)

        def sample(weights: Params, examples: list[Example], rollout: int, cursor: int, limit: int) -> list:
            branch = jax.random.fold_in(jax.random.fold_in(key, ROLLOUT), rollout)
            return collect(
                verbs, weights, policy.tokenizer, pool, examples, config.data.template, settings.group_size, branch,
                cursor, max_prompt_tokens, limit, settings.stop_texts, run.is_interrupted,
            )  # fmt: skip

        moves = loops.Moves(
            sample=sample,
            evaluate=lambda weights, step: problems.measure(weights, step, settings.limit(step)),
            update=made.update,
            score=made.score,
            to_decode=made.to_decode,
        )
        params = loops.rl_loop(
            run, STAGE, policy, stream, moves, settings, made.objective, made.optimizing, made.optimizer, made.shape,
            open_checkpoints(run, STAGE, config.checkpoint), dict(config.log), config.eval.every,
        )  # fmt: skip
    policy = export(run, policy, params)
    run.summary.write()
    if hosts.is_writer():
        report.write_report(run.workdir)
    return policy
