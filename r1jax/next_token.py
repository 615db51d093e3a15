"""The next-token loop that pretraining and SFT share: packed rows in a fixed order, one update after the other."""

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from functools import partial

import jax
import numpy as np

from r1jax import data, hosts, metrics, optim, updates
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


def take(rows: Rows, index: np.ndarray, microbatches: int = 1) -> dict[str, np.ndarray]:
    """The rows numbered, as a minibatch [M, B, T]."""
    return {name: array[index].reshape(microbatches, -1, array.shape[1]) for name, array in rows._asdict().items()}


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


def train(
    run: Run,
    stage: str,
    policy: Policy,
    program: updates.Program,
    settings: optim.OptimConfig,
    rows: Rows,
    valid: Rows | None,
    schedule: Schedule,
    saved: Checkpoints,
) -> Params:
    """Runs all steps of a stage from where its checkpoints stand, and returns the parameters.

    The order of rows is that of (seed, epoch), so the step alone says where a run stands.

    Raises:
        run.Stopped: SIGTERM came; everything is saved.
    """
    layout = run.layouts["train"]
    optimizer = optim.make_optimizer(settings, policy.params)
    update = partial(updates.make_sft_update(program, optimizer), frozen=policy.frozen)
    score, rate = partial(updates.make_score(program), frozen=policy.frozen), optim.schedule(settings)
    n, m = len(rows.tokens), schedule.microbatches
    if valid is not None:
        held_out = put_rows(take(valid, np.arange(min(schedule.valid_rows, len(valid.tokens)))), layout)
        held_out_tokens = float(hosts.fetch(held_out["is_completion"]).sum())

    state, like = training_state(policy, layout, optimizer)
    with contextlib.ExitStack() as opened:
        opened.enter_context(contextlib.closing(saved))
        step = saved.latest() or 0
        if step:
            state, _ = saved.restore(step, like)
        log = opened.enter_context(contextlib.closing(metrics.Log(run.workdir, stage, step)))
        progress = opened.enter_context(contextlib.closing(metrics.Progress(stage, schedule.steps, step)))
        while step < schedule.steps:
            start_s = time.perf_counter()
            places = range(step * schedule.rows, (step + 1) * schedule.rows)
            index = np.array([data.order(n, run.seed, place // n)[place % n] for place in places])
            state, sums = update(state, put_rows(take(rows, index, m), layout), m)
            step += 1
            scalars = step_metrics(sums, float(rate(step - 1)))
            scalars["throughput/train_tokens_per_s"] = float(sums["tokens"]) / (time.perf_counter() - start_s)
            if valid is not None and (step % schedule.valid_every == 0 or step == schedule.steps):
                logp = hosts.fetch(score(state["policy"], held_out, 1))
                loss = -float((logp * hosts.fetch(held_out["is_completion"])).sum()) / held_out_tokens
                scalars["eval/next_token_loss"] = loss
                progress.say(f"step {step}: validation loss {loss:.4f} nats per token")
            log.write(step, scalars)
            progress.step(step, scalars)
            check_finite(state["optim"], settings.non_finite_limit)
            stopping = hosts.any_across(run.stop.requested)
            if saved.due(step) or step == schedule.steps or stopping:
                saved.save(step, state, {})
            if stopping:
                saved.wait()
                raise Stopped
    return state["policy"]
