"""The RL loop: the moves of one GRPO rollout, one call each (DeepSeekMath, arXiv 2402.03300, algorithm 1).

(1) take whole prompts, (2) lay the policy out for decoding and sample, (3) grade while other slots decode,
(4) advantages per group, (5) old and reference log-probabilities, (6) one update per minibatch,
(7) save everything together.
"""

import dataclasses
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from r1jax import evaluate, flops, grpo, hosts, metrics, minibatches, optim, sharding, updates
from r1jax.checkpoint import Checkpoints
from r1jax.data import Mixture, PromptStream
from r1jax.rollout import Group, as_array, majority_is_right, records
from r1jax.run import Policy, Run, Stopped, check_finite, put_rows, training_state
from r1jax.sampler import Interrupted
from r1jax.text import reflective_words
from r1jax.types import Example, Params

# Whose log-probabilities stand for the old policy's: the trainer's own, scored anew, or those that the sampler noted.
OLD_LOGP = ("policy", "sampler")


@dataclasses.dataclass(frozen=True)
class RlConfig:
    """The schedule of RL; see configs/base.py for units and sources."""

    updates: int
    prompts_per_update: int
    group_size: int
    minibatches: int
    max_completion_tokens: int
    length_schedule: tuple[tuple[int, int], ...]
    temperature: float
    reference_every: int
    reference_on: str
    dynamic_sampling: bool
    dynamic_sampling_rounds: int
    router_replay: bool
    old_logp: str
    share_prompt: bool
    row_tokens: int
    microbatch_rows: int
    stop_texts: tuple[str, ...]

    def __post_init__(self) -> None:
        for key in ("prompts_per_update", "group_size", "minibatches", "max_completion_tokens", "reference_every"):
            if getattr(self, key) < 1:
                raise ValueError(f"config.rl.{key} is {getattr(self, key)}, wanted 1 or more")
        if self.group_size < 2:
            raise ValueError("config.rl.group_size is 1: a group of one has no baseline, so nothing would be learned")
        if self.updates % self.minibatches:
            raise ValueError(
                f"config.rl.updates ({self.updates}) must be a multiple of config.rl.minibatches ({self.minibatches}), "
                "the updates of one rollout"
            )
        if self.old_logp not in OLD_LOGP:
            raise ValueError(f"config.rl.old_logp is {self.old_logp!r}, wanted one of {', '.join(OLD_LOGP)}")
        if self.reference_on not in sharding.MEMORIES:
            wanted = ", ".join(sharding.MEMORIES)
            raise ValueError(f"config.rl.reference_on is {self.reference_on!r}, wanted one of {wanted}")
        if self.temperature <= 0:
            raise ValueError(f"config.rl.temperature is {self.temperature}; a group needs samples that differ: above 0")

    @property
    def prompts_per_rollout(self) -> int:
        """Groups of one rollout."""
        return self.prompts_per_update * self.minibatches

    def limit(self, update: int) -> int:
        """max_completion_tokens in force at this update."""
        return max([(0, self.max_completion_tokens), *(s for s in self.length_schedule if s[0] <= update)])[1]

    @property
    def longest(self) -> int:
        """The largest limit that this run will see."""
        return max([self.max_completion_tokens, *(n for at, n in self.length_schedule if at < self.updates)])


@dataclasses.dataclass
class Position:
    """Where a run stands; with the arrays of the checkpoint it says everything about the rest of the run."""

    step: int = 0  # optimizer steps done
    rollout: int = 0  # rollouts done
    cursor: int = 0  # prompts taken


Sampling = Callable[[Params, list[Example], int, int, int], list[Group]]  # params, examples, rollout, cursor, limit
Evaluation = Callable[[Params, int], None]  # params in the decode layout, step


@dataclasses.dataclass(frozen=True)
class Moves:
    """What the loop calls; made once by the stage.

    Attributes:
        to_decode, to_measure: weights in the decode layout, for rollouts and for `evaluate`.
        to_score: what is trained as `score` takes it, and as the reference is kept.
        start: the state before the first step and its shapes, as run.training_state.
        advantages: graded groups to what is trained on, as minibatches.with_advantages.
        compile: compiles what follows the first rollout, given the state's shapes; called from a thread meanwhile.
        prepare: what has to be added to a minibatch before the first update of its rollout, if anything.
    """

    sample: Sampling
    evaluate: Evaluation
    update: Callable
    score: Callable
    to_decode: Callable[[Params], Params]
    to_measure: Callable[[Params], Params]
    to_score: Callable[[Params], Params]
    start: Callable = training_state
    advantages: Callable = minibatches.with_advantages
    prepare: Callable[[updates.State, updates.Batch, int], updates.Batch] | None = None
    compile: Callable[[updates.State], None] | None = None


def rollout_metrics(groups: list[Group], drawn: int, limit: int, seconds: float) -> dict[str, float]:
    """What a rollout says before anything is trained on it."""
    reward = as_array(groups, lambda s: s.graded.reward)
    length = as_array(groups, lambda s: len(s.completion.tokens))
    flags = [flag.split(":")[0] for group in groups for s in group for flag in s.graded.flags]
    names = list(groups[0][0].graded.rewards)
    out = {
        "reward/mean": reward.mean(),
        "reward/std": reward.std(),
        "group/zero_variance_share": np.asarray(grpo.zero_variance(reward)).mean(),
        "length/mean": length.mean(),
        "length/max": length.max(),
        "length/limit": limit,
        "length/truncated_share": as_array(groups, lambda s: s.completion.stop == "length").mean(),
        "reflective/per_completion": as_array(groups, lambda s: reflective_words(s.text)).mean(),
        "throughput/rollout_tokens_per_s": length.sum() * drawn / len(groups) / seconds,
    }
    for name in names:
        values = as_array(groups, lambda s, n=name: s.graded.rewards[n])
        out |= {f"reward/{name}/mean": values.mean(), f"reward/{name}/std": values.std()}
    out |= {f"reflective/{word}": mean for word, mean in evaluate.reflective_by_word(groups).items()}
    if "accuracy" in names:
        right = as_array(groups, lambda s: s.graded.rewards["accuracy"]) > 0.5
        out |= {f"length/{name}": length[of].mean() for name, of in (("right", right), ("wrong", ~right)) if of.any()}
        out["group/majority_share"] = np.mean([majority_is_right(group, "accuracy") for group in groups])
    for flag in ("timeout", "error", "nan", "died"):
        if flag in flags:
            out[f"grading/{flag}_share"] = flags.count(flag) / reward.size
    return {name: float(value) for name, value in out.items()}


def update_metrics(sums: dict[str, Any], learning_rate: float) -> dict[str, float]:
    """Standard names of one update from its sums."""
    out = {name: float(value) for name, value in grpo.finish_metrics(sums).items()}
    out |= {
        "loss/mean": float(sums["loss"]),
        "entropy/mean": float(sums["entropy"] / np.maximum(sums["tokens"], 1)),
        "grad/norm": float(sums["optim/grad_norm"]),
        "grad/skipped": float(sums["optim/skipped"]),
        "optim/lr": learning_rate,
    }
    if "value_loss" in sums:
        out |= {"loss/value": float(sums["value_loss"]), "value/explained_share": float(sums["value_explained"])}
    if "load" in sums:
        out["expert/load_max"] = float((sums["load"].max(-1) / np.maximum(sums["load"].mean(-1), 1e-9)).max())
    return out


def rl_loop(
    run: Run,
    policy: Policy,
    stream: PromptStream | Mixture,
    moves: Moves,
    settings: RlConfig,
    objective: grpo.GrpoConfig,
    optimizing: optim.OptimConfig,
    optimizer: Any,
    shape: minibatches.Shape,
    saved: Checkpoints,
    shown: dict[str, int],
    eval_every: int,
) -> Params:
    """Runs all rollouts of a stage from where its checkpoints stand, and returns the policy."""
    layout = run.layouts["train"]
    state, like = moves.start(policy, layout, optimizer, optimizing.moments_on, saved)
    lies = jax.tree.map(lambda a: a.sharding, like["policy"])
    kept = sharding.in_memory(lies, settings.reference_on, "rl.reference_on")

    def keep(params: Params) -> Params:
        # Donated arrays must not be shared with the reference.
        return jax.device_put(moves.to_score(params), kept, may_alias=False)

    at, reference = Position(), None
    if state is None:
        tree = like
        if objective.kl_coef:
            shapes = jax.eval_shape(moves.to_score, like["policy"])
            tree = {**like, "reference": sharding.laid_out(shapes, kept)}
        state, host = saved.restore(saved.latest(), tree)
        reference, at = state.pop("reference", None), Position(**host)
    elif objective.kl_coef:
        reference = keep(state["policy"])
    log = metrics.Log(run.workdir, run.stage, at.step)
    progress = metrics.Progress(run.stage, settings.updates, at.step)
    rate, clock = optim.schedule(optimizing), metrics.Moves()
    saved_at = at.step

    def save() -> None:
        tree = {**state, **({} if reference is None else {"reference": reference})}
        saved.save(at.step, tree, dataclasses.asdict(at))
        run.summary.write()

    def heed() -> None:
        """Only while the state is that of the rollout's beginning: a position inside a rollout cannot be saved."""
        if run.is_interrupted():
            raise Interrupted

    compiler, compiling = futures.ThreadPoolExecutor(1, "compile"), None
    if moves.compile is not None and at.step < settings.updates:
        compiling = compiler.submit(moves.compile, like)

    def is_evaluated(step: int) -> bool:
        passed = eval_every > 0 and step // eval_every > (step - settings.minibatches) // eval_every
        return (step == 0 and eval_every >= 0) or step >= settings.updates or passed

    try:
        while True:
            if is_evaluated(at.step):
                moves.evaluate(moves.to_measure(state["policy"]), at.step)
            if at.step >= settings.updates:
                if saved.latest() is None:  # what a stage leaves is taken from its last checkpoint
                    save()
                break
            limit = settings.limit(at.step)
            with clock("layout"):
                weights = moves.to_decode(state["policy"])
            with clock("rollout"):
                groups, cursor, drawn = _sample(moves, weights, stream, settings, at, limit)
            del weights  # else they lie beside the updates
            heed()
            seconds = clock.take()
            scalars = rollout_metrics(groups, drawn, limit, seconds["time/rollout_s"]) | seconds
            with clock("advantages"):
                items = moves.advantages(groups, objective, limit)
                parts = minibatches.split(
                    [i for group in items for i in group], settings.minibatches, (run.seed, at.rollout)
                )
            rows = records(groups[: shown["rollout_groups"]], policy.tokenizer, run.stage, at.step, at.rollout)
            trained = (item for group in items for item in group)
            rows = ({**row, "advantage": item.advantage} for row, item in zip(rows, trained, strict=False))
            metrics.write_rollout(run.workdir, run.stage, at.rollout, rows)
            if compiling is not None:
                with clock("compile"):
                    compiling.result()
                compiling = None
            # From host memory once for the whole rollout; what lies on the devices already stays where it is.
            scoring = None if reference is None else jax.device_put(reference, lies)
            old, batches = None, []
            lengths = [(len(g[0].prompt_tokens), [len(s.completion.tokens) for s in g]) for g in groups]
            work = [0.0] * len(parts)
            work[0] = flops.sampled(policy.config, lengths) * drawn / len(groups)
            for j, part in enumerate(parts):
                with clock("pack"):
                    arrays, n = minibatches.pack(part, shape, objective, limit)
                    scored = (reference is not None) + (settings.old_logp == "policy" and j > 0)
                    once = flops.packed(policy.config, arrays["positions"], arrays["segments"] > 0)
                    work[j] += (flops.BACKWARD + scored) * once.sum()
                    unscored = put_rows(arrays, layout)
                batch = dict(unscored)
                if reference is not None:
                    with clock("ref_logp"):
                        batch["ref_logp"] = moves.score(scoring, unscored, n)
                if settings.old_logp == "sampler":
                    batch["old_logp"] = batch["sampler_logp"]
                elif j:
                    with clock("old_logp"):
                        old = moves.to_score(state["policy"]) if old is None else old
                        batch["old_logp"] = moves.score(old, unscored, n)
                else:
                    # The first minibatch is on-policy by construction; the array is there for the program's sake.
                    batch["old_logp"] = jnp.zeros_like(batch["sampler_logp"], device=batch["sampler_logp"].sharding)
                if moves.prepare is not None:
                    with clock("values"):
                        batch = moves.prepare(state, batch, n)
                batches.append((batch, n))
            del scoring, old  # as the weights above
            with clock("update"):  # which would wait for them if this did not
                jax.block_until_ready(batches)
            heed()
            for j, (batch, n) in enumerate(batches):
                with clock("update"):
                    state, sums = moves.update(state, batch, n, j == 0)
                    sums = {name: hosts.fetch(value) for name, value in sums.items()}
                at.step += 1
                scalars["compute/flops"] = work[j]
                scalars |= update_metrics(sums, float(rate(at.step - 1))) | clock.take()
                log.write(at.step, scalars)
                progress.step(at.step, scalars)
                scalars = {}
                check_finite(state["optim"], optimizing.non_finite_limit)
                if reference is not None and at.step % settings.reference_every == 0:
                    reference = keep(state["policy"])
                if at.step % shown["sample_every"] == 0:
                    s = groups[at.step // shown["sample_every"] % len(groups)][0]
                    progress.sample(at.step, s.prompt, s.text, s.graded.reward)
            at.rollout, at.cursor = at.rollout + 1, cursor
            stopping = run.is_interrupted()
            if at.step // saved.save_every > saved_at // saved.save_every or at.step >= settings.updates or stopping:
                save()
                saved_at = at.step
            if stopping:
                raise Interrupted
    except Interrupted as stopped:
        # Before its first update, the state is still that of the rollout's beginning.
        save()
        saved.wait()
        raise Stopped from stopped
    finally:
        progress.close()
        log.close()
        saved.close()
        compiler.shutdown()  # last: it waits for a compilation that is under way
    return state["policy"]


def _sample(
    moves: Moves, weights: Params, stream: PromptStream | Mixture, settings: RlConfig, at: Position, limit: int
) -> tuple[list[Group], int, int]:
    """The groups of a rollout, the new cursor, and how many groups were drawn for it."""
    want, cursor = settings.prompts_per_rollout, at.cursor
    kept: list[Group] = []
    rest: list[Group] = []
    drawn = 0
    for _ in range(settings.dynamic_sampling_rounds if settings.dynamic_sampling else 1):
        groups = moves.sample(weights, stream.take(cursor, want), at.rollout, cursor, limit)
        cursor, drawn = cursor + want, drawn + want
        if not settings.dynamic_sampling:
            return groups, cursor, drawn
        has_signal = ~np.asarray(grpo.zero_variance(as_array(groups, lambda s: s.graded.reward)))
        keep = np.asarray(grpo.keep_groups(has_signal, want - len(kept)))
        kept += [g for g, k in zip(groups, keep, strict=True) if k]
        rest += [g for g, k in zip(groups, keep, strict=True) if not k]
        if len(kept) == want:
            break
    # The batch keeps its size: what is missing after the last round is filled with groups that teach nothing.
    return kept + rest[: want - len(kept)], cursor, drawn
