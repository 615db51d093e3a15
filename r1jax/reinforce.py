"""GRPO on a stream of prompts: what R1-Zero, reasoning RL and all-scenario RL share; their pages are in stages/."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax

from r1jax import data, draw, grpo, held_out, hosts, loops, minibatches, optim, report, updates
from r1jax.rollout import Group, collect, encode_prompts
from r1jax.run import (
    ROLLOUT,
    Config,
    Policy,
    Run,
    check_lengths,
    decode_layout,
    export,
    make_verbs,
    open_checkpoints,
    open_pool,
    open_source,
    optim_config,
    training_program,
)
from r1jax.types import Example, Params


@dataclasses.dataclass(frozen=True)
class General:
    """General instructions, which join the problems, and the reward models that judge them.

    Attributes:
        mix: the stream of problems with instructions among them.
        judge: adds the reward models' scores to graded groups.
        check: called after each evaluation.
    """

    mix: Callable[[data.PromptStream], data.Mixture]
    judge: Callable[[list[Group]], list[Group]]
    check: Callable[[], None]


def reinforce(run: Run, config: Config, policy: Policy, general: General | None = None) -> Policy:
    """Trains the policy by GRPO; leaves a released-model folder in WORKDIR/models and WORKDIR/report.html."""
    settings = loops.RlConfig(**{**config["rl"], "length_schedule": tuple(map(tuple, config["rl"]["length_schedule"]))})
    objective = grpo.GrpoConfig(**config["grpo"])
    optimizing = optim_config(config, settings.updates)
    train, decode = run.layouts["train"], run.layouts["decode"]
    prompts = config["data"]
    key, max_prompt_tokens = jax.random.key(run.seed), prompts["max_prompt_tokens"]

    longest = settings.longest + max_prompt_tokens
    check_lengths(policy, max_prompt_tokens, settings.longest, settings.row_tokens)
    stream: data.PromptStream | data.Mixture
    stream = data.PromptStream(open_source(config, prompts["source"], prompts["split"]), run.seed)
    if general is not None:
        stream = general.mix(stream)
    # Now rather than when its turn comes: a prompt that is too long.
    encode_prompts(stream.examples, prompts["template"], policy.tokenizer, max_prompt_tokens)

    program = training_program(config, policy, train, temperature=settings.temperature)
    row_tokens = settings.row_tokens or -(-longest // 128) * 128
    replay = settings.router_replay and policy.config.n_moe > 0
    n_rows = settings.microbatch_rows or -(-settings.prompts_per_update * settings.group_size * longest // row_tokens)
    shape = minibatches.Shape(
        row_tokens, -(-n_rows // train.size("rows")) * train.size("rows"), settings.share_prompt, replay
    )
    optimizer = optim.make_optimizer(optimizing, policy.params)

    verbs = make_verbs(config, policy, decode, draw.DrawConfig(temperature=settings.temperature))
    with open_pool(config) as pool:
        problems = held_out.prepare(run, config, policy, pool, verbs, general.judge if general else None)

        def sample(weights: Params, examples: list[Example], rollout: int, cursor: int, limit: int) -> list[Group]:
            branch = jax.random.fold_in(jax.random.fold_in(key, ROLLOUT), rollout)
            groups = collect(
                verbs, weights, policy.tokenizer, pool, examples, prompts["template"], settings.group_size, branch,
                cursor, max_prompt_tokens, limit, settings.stop_texts, run.is_interrupted,
            )  # fmt: skip
            return general.judge(groups) if general else groups

        def evaluate(weights: Params, step: int) -> None:
            problems.measure(weights, step, settings.limit(step))
            if general:
                general.check()

        moves = loops.Moves(
            sample=sample,
            evaluate=evaluate,
            update=partial(updates.make_rl_update(program, objective, optimizer, row_tokens + 1), frozen=policy.frozen),
            score=partial(updates.make_score(program), frozen=policy.frozen),
            to_decode=decode_layout(policy, decode, config["model"]["compute_dtype"]),
        )
        params = loops.rl_loop(
            run, policy, stream, moves, settings, objective, optimizing, optimizer, shape,
            open_checkpoints(run, config["checkpoint"]), dict(config["log"]), config["eval"]["every"],
        )  # fmt: skip
    policy = export(run, policy, params)
    run.summary.write()
    if hosts.is_writer():
        report.write_report(run.workdir)
    return policy
