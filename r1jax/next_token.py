"""The next-token loop that pretraining and SFT share: packed rows in a fixed order, one update after the other."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial

import jax
import numpy as np

from r1jax import data, flops, hosts, metrics, optim, updates
from r1jax.checkpoint import Checkpoints
from r1jax.packing import Rows
from r1jax.run import Policy, Run, Stopped, check_finite, put_rows, training_state
from r1jax.types import Params


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How much is read in a step, and when it is validated; rows are those of `Rows`."""

    steps: int
    rows: int
    valid_every: int
    valid_rows: int
    microbatch_rows: int = 0  # whose gradient is taken at once; 0: all of them

    @property
    def microbatches(self) -> int:
        """Microbatches of a step.

        Raises:
            ValueError: they do not come out even.
        """
        size = self.microbatch_rows or self.rows
        if self.rows % size:
            raise ValueError(f"config.sft.microbatch_rows ({size}) does not divide config.sft.rows ({self.rows})")
        return self.rows // size


def take(rows: Mapping[str, np.ndarray], index: np.ndarray, microbatches: int = 1) -> dict[str, np.ndarray]:
    """The rows (or pairs of rows) numbered, as a minibatch [M, B, T]."""
    return {name: array[index].reshape(microbatches, -1, array.shape[-1]) for name, array in rows.items()}


def step_metrics(sums: Mapping[str, jax.Array], learning_rate: float) -> dict[str, float]:
    """Standard names of one update from its sums."""
    s = {name: hosts.fetch(value) for name, value in sums.items()}
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


Update = Callable[[updates.State, updates.Batch, int], tuple[updates.State, dict[str, jax.Array]]]


def run_steps(
    run: Run,
    state: updates.State | None,
    like: updates.State,
    update: Update,
    settings: optim.OptimConfig,
    rows: Mapping[str, np.ndarray],
    schedule: Schedule,
    saved: Checkpoints,
    describe: Callable[[Mapping[str, jax.Array], float], dict[str, float]],
    validate: Callable[[Params], dict[str, float]] | None,
    work: np.ndarray | None = None,
    evaluate: Callable[[Params, int], None] | None = None,
) -> Params:
    """Runs all steps from where the checkpoints stand, and returns the parameters.

    The order of rows is that of (seed, epoch), so the step alone says where a run stands.

    Args:
        rows: arrays whose first axis counts what is drawn together: a row, or a pair of them.
        describe: standard names of one update from its sums and the learning rate.
        validate: what is measured of parameters every `schedule.valid_every` steps.
        work: operations that one step on each row asks for, logged where given.
        evaluate: is shown the parameters before each step, with the steps done; it may raise run.Stopped.

    Raises:
        run.Stopped: SIGTERM came; everything is saved.
    """
    layout, rate = run.layouts["train"], optim.schedule(settings)
    n, m = len(rows["tokens"]), schedule.microbatches
    with contextlib.ExitStack() as opened:
        opened.enter_context(contextlib.closing(saved))
        step = saved.latest() or 0
        if step:
            state = None  # two of them may not fit
            state, _ = saved.restore(step, like)
        log = opened.enter_context(contextlib.closing(metrics.Log(run.workdir, run.stage, step)))
        progress = opened.enter_context(contextlib.closing(metrics.Progress(run.stage, schedule.steps, step)))
        while step < schedule.steps:
            if evaluate is not None:
                try:
                    evaluate(state["policy"], step)
                except Stopped:
                    saved.save(step, state, {})
                    saved.wait()
                    raise
            start_s = time.perf_counter()
            places = range(step * schedule.rows, (step + 1) * schedule.rows)
            index = np.array([data.order(n, run.seed, place // n)[place % n] for place in places])
            state, sums = update(state, put_rows(take(rows, index, m), layout), m)
            step += 1
            scalars = describe(sums, float(rate(step - 1)))
            scalars["throughput/train_tokens_per_s"] = float(sums["tokens"]) / (time.perf_counter() - start_s)
            if work is not None:
                scalars["compute/flops"] = float(work[index].sum())
            if validate is not None and (step % schedule.valid_every == 0 or step == schedule.steps):
                found = validate(state["policy"])
                scalars |= found
                progress.say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
            log.write(step, scalars)
            progress.step(step, scalars)
            check_finite(state["optim"], settings.non_finite_limit)
            stopping = run.is_interrupted()
            if saved.due(step) or step == schedule.steps or stopping:
                saved.save(step, state, {})
            if stopping:
                saved.wait()
                raise Stopped
    return state["policy"]


def train(
    run: Run,
    policy: Policy,
    program: updates.Program,
    settings: optim.OptimConfig,
    rows: Rows,
    valid: Rows | None,
    schedule: Schedule,
    saved: Checkpoints,
    evaluate: Callable[[Params, int], None] | None = None,
) -> Params:
    """Next-token prediction over packed rows; see `run_steps`."""
    layout = run.layouts["train"]
    optimizer = optim.make_optimizer(settings, policy.params)
    score = partial(updates.make_score(program), frozen=policy.frozen)
    if valid is not None:
        index = np.arange(min(schedule.valid_rows, len(valid.tokens)))
        held_out = put_rows(take(valid._asdict(), index), layout)
        held_out_tokens = float(hosts.fetch(held_out["is_completion"]).sum())

    def validate(params: Params) -> dict[str, float]:
        logp = hosts.fetch(score(params, held_out, 1))
        return {"eval/next_token_loss": -float((logp * hosts.fetch(held_out["is_completion"])).sum()) / held_out_tokens}

    return run_steps(
        run,
        *training_state(policy, layout, optimizer, settings.moments_on, saved),
        partial(updates.make_sft_update(program, optimizer), frozen=policy.frozen),
        settings,
        rows._asdict(),
        schedule,
        saved,
        step_metrics,
        None if valid is None else validate,
        flops.BACKWARD * flops.packed(policy.config, rows.positions, rows.segments > 0),
        evaluate,
    )
