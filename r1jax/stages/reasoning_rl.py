"""Reasoning RL (R1 report, section 2.2): from the base, with accuracy and format as the only rewards, it is R1-Zero."""

from functools import partial

import jax
from ml_collections import ConfigDict

from r1jax import (
    data,
    draw,
    evaluate,
    grpo,
    hosts,
    loops,
    metrics,
    minibatches,
    optim,
    report,
    sharding,
    sources,
    updates,
)
from r1jax.rewards.pool import RewardPool
from r1jax.rewards.table import check_examples
from r1jax.rollout import collect, encode_prompts, records
from r1jax.run import Policy, Run, export, open_checkpoints
from r1jax.slots import SamplerConfig, Verbs
from r1jax.types import Example, Params

STAGE = "reasoning_rl"

# Draws of evaluations and of rollouts come from different branches of the run's key.
ROLLOUT, EVALUATION = 0, 1


def open_source(config: ConfigDict, spec: str, split: str) -> data.Source:
    """The prompts that config.data names, their gold answers checked."""
    c = config.data
    columns = sources.Columns(c.question_column, c.answer_column, c.id_column or None, c.level_column or None, c.grader)
    source = data.open_source(spec, split=split, columns=columns, size=c.gym_size, seed=config.seed)
    check_examples(source.examples, list(config.rewards))
    return source


def check_lengths(config: ConfigDict, policy: Policy, longest: int) -> None:
    """Raises ValueError where prompt and completion of `longest` tokens together do not fit into context or row."""
    asked = f"config.data.max_prompt_tokens and config.rl.max_completion_tokens (or length_schedule) allow {longest}"
    if longest > policy.config.max_position_embeddings:
        raise ValueError(f"{asked} tokens, but the policy reads {policy.config.max_position_embeddings} at most")
    if 0 < config.rl.row_tokens < longest:
        raise ValueError(f"{asked} tokens, but config.rl.row_tokens is {config.rl.row_tokens}")


def make_verbs(config: ConfigDict, policy: Policy, layout: sharding.Layout, drawing: draw.DrawConfig) -> Verbs:
    """The sampling functions of this policy for one way of drawing."""
    settings = SamplerConfig(**config.sampler)
    return Verbs(policy.config, settings, drawing, layout, sorted(policy.tokenizer.eos_ids), config.model.cache_dtype)


def stage(run: Run, config: ConfigDict, policy: Policy) -> Policy:
    """Trains the policy by GRPO; leaves a released-model folder in WORKDIR/model and WORKDIR/report.html."""
    settings = loops.RlConfig(**{**config.rl, "length_schedule": tuple(map(tuple, config.rl.length_schedule))})
    objective = grpo.GrpoConfig(**config.grpo)
    optimizing = optim.OptimConfig(**{k: v for k, v in config.optim.items() if k != "router_bias_rate"})
    train, decode = run.layouts["train"], run.layouts["decode"]
    key, max_prompt_tokens = jax.random.key(run.seed), config.data.max_prompt_tokens

    longest = settings.longest + max_prompt_tokens
    check_lengths(config, policy, longest)
    stream = data.PromptStream(open_source(config, config.data.source, config.data.split), run.seed)
    held_out: list[Example] = []
    if config.eval.problems:
        tests = open_source(config, config.data.eval_source or config.data.source, config.data.eval_split)
        held_out = data.PromptStream(tests, 0).take(0, min(config.eval.problems, len(tests.examples)))

    # Now rather than when its turn comes: a prompt that is too long.
    encode_prompts([*stream.source.examples, *held_out], config.data.template, policy.tokenizer, max_prompt_tokens)

    program = updates.Program(
        config=policy.config,
        layout=train,
        compute_dtype=config.model.compute_dtype,
        remat=config.model.remat,
        scan_unroll=config.model.scan_unroll,
        temperature=settings.temperature,
        router_bias_rate=config.optim.router_bias_rate,
        lora=policy.lora,
    )
    row_tokens = settings.row_tokens or -(-longest // 128) * 128
    replay = settings.router_replay and policy.config.n_moe > 0
    n_rows = settings.microbatch_rows or -(-settings.prompts_per_update * settings.group_size * longest // row_tokens)
    shape = minibatches.Shape(
        row_tokens, -(-n_rows // train.size("rows")) * train.size("rows"), settings.share_prompt, replay
    )
    optimizer = optim.make_optimizer(optimizing, policy.params)

    drawing = draw.DrawConfig(temperature=settings.temperature)
    verbs = make_verbs(config, policy, decode, drawing)
    eval_drawing = draw.DrawConfig(config.eval.temperature, config.eval.top_k, config.eval.top_p)
    eval_verbs = verbs if eval_drawing == drawing else make_verbs(config, policy, decode, eval_drawing)

    def is_interrupted() -> bool:
        # Several hosts stop together, at the end of the rollout.
        return run.stop.requested and hosts.count() == 1

    grading, paths = config.grading, dict(config.reward_paths)
    limits = grading.timeout_s, paths, grading.batch_timeout_s, tuple(grading.sandbox_accepts)
    with RewardPool(dict(config.rewards), grading.workers, *limits) as pool:

        def sample(weights: Params, examples: list[Example], rollout: int, cursor: int, limit: int) -> list:
            branch = jax.random.fold_in(jax.random.fold_in(key, ROLLOUT), rollout)
            return collect(
                verbs, weights, policy.tokenizer, pool, examples, config.data.template, settings.group_size, branch,
                cursor, max_prompt_tokens, limit, settings.stop_texts, is_interrupted,
            )  # fmt: skip

        def evaluation(weights: Params, step: int) -> None:
            if not held_out or any((e["stage"], e["step"]) == (STAGE, step) for e in run.summary.evals):
                return
            limit = config.eval.max_completion_tokens or settings.limit(step)
            groups = collect(
                eval_verbs, weights, policy.tokenizer, pool, held_out, config.data.template, config.eval.samples,
                jax.random.fold_in(key, EVALUATION), 0, max_prompt_tokens, limit, settings.stop_texts,
                is_interrupted,
            )  # fmt: skip
            # The same prompts each time, so that the report can lay a problem's completions side by side.
            rows = records(groups[: config.log.rollout_groups], policy.tokenizer, f"{STAGE} evaluation", step, step)
            metrics.write_rollout(run.workdir, f"{STAGE}-evaluation", step, rows)
            record = evaluate.measure(groups, STAGE, step)
            run.summary.add(record)
            low, high = record["pass_at_1_ci"]
            hosts.say(
                f"evaluation at step {step}: pass@1 {record['pass_at_1']:.1%} [{low:.1%}, {high:.1%}], "
                f"cons@{record['k']} {record['cons_at_k']:.1%}, {record['mean_completion_tokens']:.1f} tokens, "
                f"{record['reflective_per_completion']:.2f} reflective words ({record['n_problems']} problems)"
            )

        moves = loops.Moves(
            sample=sample,
            evaluate=evaluation,
            update=partial(updates.make_rl_update(program, objective, optimizer, row_tokens + 1), frozen=policy.frozen),
            score=partial(updates.make_score(program), frozen=policy.frozen),
            to_decode=loops.decode_layout(policy, decode, config.model.compute_dtype),
        )
        params = loops.rl_loop(
            run, STAGE, policy, stream, moves, settings, objective, optimizing, optimizer, shape,
            open_checkpoints(run, STAGE, config.checkpoint), dict(config.log), config.eval.every,
        )  # fmt: skip
    policy = export(run, policy, params)
    run.summary.write()
    if hosts.is_writer():
        report.write_report(run.workdir)
    return policy
