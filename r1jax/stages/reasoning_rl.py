"""Reasoning RL (R1 report, section 2.2): from the base, with accuracy and format as the only rewards, it is R1-Zero."""

import jax
from ml_collections import ConfigDict

from r1jax import data, draw, evaluate, grpo, loops, minibatches, optim, report, sharding, sources, updates
from r1jax.model import convert
from r1jax.rewards.pool import RewardPool
from r1jax.rewards.table import check_examples
from r1jax.rollout import collect
from r1jax.run import Policy, Run, open_checkpoints
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


def make_verbs(config: ConfigDict, policy: Policy, layout: sharding.Layout, drawing: draw.DrawConfig) -> Verbs:
    """The sampling functions of this policy for one way of drawing."""
    settings = SamplerConfig(**config.sampler)
    return Verbs(policy.config, settings, drawing, layout, [policy.tokenizer.eos_id], config.model.cache_dtype)


def stage(run: Run, config: ConfigDict, policy: Policy) -> Policy:
    """Trains the policy by GRPO; leaves a released-model folder in WORKDIR/model and WORKDIR/report.html."""
    settings = loops.RlConfig(**{**config.rl, "length_schedule": tuple(map(tuple, config.rl.length_schedule))})
    objective = grpo.GrpoConfig(**config.grpo)
    optimizing = optim.OptimConfig(**{k: v for k, v in config.optim.items() if k != "router_bias_rate"})
    train, decode = run.layouts["train"], run.layouts["decode"]
    key = jax.random.key(run.seed)

    stream = data.PromptStream(open_source(config, config.data.source, config.data.split), run.seed)
    held_out: list[Example] = []
    if config.eval.problems:
        tests = open_source(config, config.data.eval_source or config.data.source, config.data.eval_split)
        held_out = data.PromptStream(tests, 0).take(0, min(config.eval.problems, len(tests.examples)))

    program = updates.Program(
        config=policy.config,
        layout=train,
        compute_dtype=config.model.compute_dtype,
        remat=config.model.remat,
        scan_unroll=config.model.scan_unroll,
        temperature=settings.temperature,
        router_bias_rate=config.optim.router_bias_rate,
    )
    longest = settings.longest + config.data.max_prompt_tokens
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

    with RewardPool(dict(config.rewards), config.grading.workers, config.grading.timeout_s) as pool:

        def sample(weights: Params, examples: list[Example], rollout: int, cursor: int, limit: int) -> list:
            branch = jax.random.fold_in(jax.random.fold_in(key, ROLLOUT), rollout)
            return collect(
                verbs, weights, policy.tokenizer, pool, examples, config.data.template, settings.group_size, branch,
                cursor, config.data.max_prompt_tokens, limit, settings.stop_texts, lambda: run.stop.requested,
            )  # fmt: skip

        def evaluation(weights: Params, step: int) -> None:
            if not held_out or any((e["stage"], e["step"]) == (STAGE, step) for e in run.summary.evals):
                return
            limit = config.eval.max_completion_tokens or settings.limit(step)
            groups = collect(
                eval_verbs, weights, policy.tokenizer, pool, held_out, config.data.template, config.eval.samples,
                jax.random.fold_in(key, EVALUATION), 0, config.data.max_prompt_tokens, limit, settings.stop_texts,
                lambda: run.stop.requested,
            )  # fmt: skip
            record = evaluate.measure(groups, STAGE, step)
            run.summary.add(record)
            low, high = record["pass_at_1_ci"]
            print(
                f"evaluation at step {step}: pass@1 {record['pass_at_1']:.1%} [{low:.1%}, {high:.1%}], "
                f"cons@{record['k']} {record['cons_at_k']:.1%}, {record['mean_completion_tokens']:.1f} tokens, "
                f"{record['reflective_per_completion']:.2f} reflective words ({record['n_problems']} problems)",
                flush=True,
            )

        moves = loops.Moves(
            sample=sample,
            evaluate=evaluation,
            update=updates.make_rl_update(program, objective, optimizer, row_tokens + 1),
            score=updates.make_score(program),
            to_decode=loops.decode_layout(policy, decode, config.model.compute_dtype),
        )
        params = loops.rl_loop(
            run, STAGE, policy, stream, moves, settings, objective, optimizing, optimizer, shape,
            open_checkpoints(run, STAGE, config.checkpoint), dict(config.log), config.eval.every,
        )  # fmt: skip
    out = run.workdir / "model"
    if not out.exists():
        files = list(policy.folder.glob("tokenizer*"))
        convert.save(jax.device_get(params), policy.config, out, extra_files=files)
    run.summary.write()
    report.write_report(run.workdir)
    return Policy(policy.config, params, policy.tokenizer, out)
