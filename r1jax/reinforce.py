"""GRPO on a stream of prompts: what R1-Zero, reasoning RL and all-scenario RL share; their pages are in stages/."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from r1jax import data, draw, examine, grpo, held_out, hosts, loops, minibatches, optim, report, sharding, updates
from r1jax.model.config import ModelConfig
from r1jax.rewards.pool import Graded, RewardPool
from r1jax.rollout import Group, Sample, collect, encode_prompts
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
    score_layout,
    training_program,
)
from r1jax.slots import Verbs
from r1jax.types import Completion, Example, Params

# What scoring adds to a packed minibatch.
SCORED = ("old_logp", "ref_logp")


@dataclasses.dataclass(frozen=True)
class General:
    """General instructions, which join the problems, and the reward models that judge them.

    Attributes:
        mix: the stream of problems with instructions among them.
        judge: adds the reward models' scores to graded groups.
        watch: makes what looks at the weights (decode layout) of a step, with a limit of completion tokens, wherever
            config.eval.every asks for it; the held-out problems are then left to the end.
    """

    mix: Callable[[data.PromptStream], data.Mixture | data.PromptStream]
    judge: Callable[[list[Group]], list[Group]]
    watch: Callable[[RewardPool, Verbs], Callable[[Params, int, int], None]] | None = None


@dataclasses.dataclass(frozen=True)
class Programs:
    """Everything jitted that the loop calls, and the settings that it was built by; r1jax.plan builds it too.

    Attributes:
        shape: of a minibatch.
        update, score, to_decode, to_measure, to_score: as in loops.Moves.
    """

    settings: loops.RlConfig
    objective: grpo.GrpoConfig
    optimizing: optim.OptimConfig
    optimizer: Any
    shape: minibatches.Shape
    update: Callable
    score: Callable
    to_decode: Callable
    to_measure: Callable
    to_score: Callable
    verbs: Verbs


def programs(config: Config, policy: Policy, layouts: dict[str, sharding.Layout]) -> Programs:
    """The programs of a run; of the policy's weights only shapes are looked at.

    Raises:
        ValueError: a setting that cannot be, or lengths that do not fit into a row or into the policy's context.
    """
    rl, max_prompt_tokens = config["rl"], config["data"]["max_prompt_tokens"]
    settings = loops.RlConfig(**{**rl, "length_schedule": tuple(map(tuple, rl["length_schedule"]))})
    objective, optimizing = grpo.GrpoConfig(**config["grpo"]), optim_config(config, settings.updates)
    train, decode = layouts["train"], layouts["decode"]
    kind, dtype = config["sampler"]["weights"], config["model"]["compute_dtype"]
    _check_correction(kind, settings, objective)
    measured = decode_layout(policy, decode, dtype)
    longest = settings.longest + max_prompt_tokens
    check_lengths(policy, max_prompt_tokens, settings.longest, settings.row_tokens)
    program = training_program(config, policy, train, temperature=settings.temperature)
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
        to_decode=decode_layout(policy, decode, dtype, kind) if kind else measured,
        to_measure=measured,
        to_score=score_layout(policy, train, dtype),
        verbs=make_verbs(config, policy, decode, draw.DrawConfig(temperature=settings.temperature)),
    )


def _check_correction(kind: str, settings: loops.RlConfig, objective: grpo.GrpoConfig) -> None:
    """Raises ValueError where completions come from a quantized policy and nothing weighs them for the one trained."""
    if not kind:
        return
    quantized = f"config.sampler.weights is {kind!r}, so that completions are drawn from another policy than is trained"
    if objective.importance_cap is None:
        raise ValueError(f"{quantized}; set config.grpo.importance_cap, which is None, to correct for it")
    if settings.old_logp == "sampler" and settings.minibatches > 1:
        # Then the old policy's log-probabilities are the sampler's: all importance weights are 1, and the ratio is
        # clipped around the quantized policy, in every update of a rollout but the first.
        raise ValueError(
            f"{quantized}; set config.rl.old_logp to 'policy': with 'sampler' config.grpo.importance_cap corrects the "
            "first update of a rollout alone"
        )


def minibatch_like(made: Programs, model: ModelConfig, layout: sharding.Layout) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a scored minibatch's arrays: their names and types are those that packing two tokens gives."""
    routed = (2, model.n_moe, model.num_experts_per_tok)
    completion = Completion(0, 0, np.ones(1, np.int32), np.zeros(1, np.float32), "stop", np.zeros(routed, np.int16))
    sample = Sample({}, "", (1, 1), completion, "", Graded(0, {}, 0.0, None, (), 0.0))
    shape = dataclasses.replace(made.shape, row_tokens=4, rows=1)
    arrays, _ = minibatches.pack([minibatches.Trained(sample, 0.0, True)], shape, made.objective, 1)
    arrays["old_logp"] = arrays["sampler_logp"]
    if made.objective.kl_coef:
        arrays["ref_logp"] = arrays["sampler_logp"]
    items = made.settings.prompts_per_update * made.settings.group_size
    sizes = -(-items // made.shape.rows), made.shape.rows, made.shape.row_tokens
    return {
        name: jax.ShapeDtypeStruct(
            (*sizes, *a.shape[3:]),
            jax.dtypes.canonicalize_dtype(a.dtype),
            sharding=layout.sharding(None, "rows", "tokens", *(None,) * (a.ndim - 3)),
        )
        for name, a in arrays.items()
    }


def compile_training(made: Programs, policy: Policy, layout: sharding.Layout, state: updates.State) -> None:
    """Compiles what follows a rollout, so that the loop's first calls find it done; of `state` the shapes count."""
    batch = minibatch_like(made, policy.config, layout)
    unscored = {name: a for name, a in batch.items() if name not in SCORED}
    # Update before score: it takes longest, and a rollout may be short.
    made.update.func.lower(state, batch, 1, True, **made.update.keywords).compile()
    if made.objective.kl_coef or (made.settings.old_logp == "policy" and made.settings.minibatches > 1):
        params = sharding.laid_out(
            jax.eval_shape(made.to_score, state["policy"]), jax.tree.map(lambda a: a.sharding, state["policy"])
        )
        made.score.func.lower(params, unscored, 1, **made.score.keywords).compile()


def reinforce(
    run: Run,
    config: Config,
    policy: Policy,
    general: General | None = None,
    adapt: Callable[[Programs, loops.Moves], loops.Moves] = lambda made, moves: moves,
) -> Policy:
    """Trains the policy by GRPO; leaves a released-model folder in WORKDIR/models and WORKDIR/report.html.

    Args:
        adapt: puts other moves in place of GRPO's.
    """
    made, prompts = programs(config, policy, run.layouts), config["data"]
    settings, verbs = made.settings, made.verbs
    key, max_prompt_tokens = jax.random.key(run.seed), prompts["max_prompt_tokens"]

    stream: data.PromptStream | data.Mixture
    stream = data.PromptStream(open_source(config, prompts["source"], prompts["split"]), run.seed)
    if general is not None:
        stream = general.mix(stream)
    # Now rather than when its turn comes: a prompt that is too long.
    encode_prompts(stream.examples, prompts["template"], policy.tokenizer, max_prompt_tokens)

    on_benchmarks = examine.open_benchmarks(run, config, policy, stream.examples)
    with open_pool(config) as pool:
        judge = general.judge if general else None
        problems = held_out.prepare(run, config, policy, pool, verbs, judge, stream.examples)
        watch = general.watch(pool, verbs) if general and general.watch else None

        def sample(weights: Params, examples: list[Example], rollout: int, cursor: int, limit: int) -> list[Group]:
            branch = jax.random.fold_in(jax.random.fold_in(key, ROLLOUT), rollout)
            groups = collect(
                verbs, weights, policy.tokenizer, pool, examples, prompts["template"], settings.group_size, branch,
                cursor, max_prompt_tokens, limit, settings.stop_texts, run.is_interrupted,
                with_experts=made.shape.replay,
            )  # fmt: skip
            return general.judge(groups) if general else groups

        def evaluate(weights: Params, step: int) -> None:
            if watch is None or step >= settings.updates:
                problems.measure(weights, step, settings.limit(step))
            if watch is not None:
                watch(weights, step, settings.limit(step))

        moves = loops.Moves(
            sample, evaluate, made.update, made.score, made.to_decode, made.to_measure,
            made.to_score,
            compile=partial(compile_training, made, policy, run.layouts["train"]),
        )  # fmt: skip
        moves = adapt(made, moves)
        params = loops.rl_loop(
            run, policy, stream, moves, settings, made.objective, made.optimizing, made.optimizer, made.shape,
            open_checkpoints(run, config["checkpoint"]), dict(config["log"]), config["eval"]["every"],
        )  # fmt: skip
    on_benchmarks(dataclasses.replace(policy, params=params), settings.updates)
    policy = export(run, policy, params)
    run.summary.write()
    if hosts.is_writer():
        report.write_report(run.workdir)
    return policy
