"""One GRPO step of fixed work: python -m tests.bench.step (or `make bench`); writes tests/bench/latest.json.

32 prompts of 32 tokens, 16 completions each, exactly 64 new tokens, dense 4 layers, width 256, 4 heads, MLP 1,024,
vocabulary 512, float32, KL against a reference, one inner epoch, AdamW. The reward is the share of even ids.
With BENCH_LOCK=FILE in the environment, several benchmarks given the same file take turns, one step at a time.
"""

import time

START_S = time.perf_counter()

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import random
import statistics
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from r1jax import draw, grpo, hosts, loops, minibatches, optim, run, sampler, sharding, slots, updates
from r1jax.model.config import ModelConfig
from r1jax.rewards.pool import Graded
from r1jax.rollout import Sample
from r1jax.types import Completion, Request

PROMPTS, PROMPT_TOKENS, GROUP, NEW_TOKENS, VOCAB = 32, 32, 16, 64, 512
LATEST = pathlib.Path(__file__).parent / "latest.json"

MODEL = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=64,
    intermediate_size=1024,
    qk_norm=True,
    tie_word_embeddings=True,
)


def prompts(step: int) -> list[tuple[int, ...]]:
    """Random ids; 0..7 stay free for special tokens."""
    rng = random.Random(1234 + step)
    return [tuple(rng.randrange(8, VOCAB) for _ in range(PROMPT_TOKENS)) for _ in range(PROMPTS)]


def requests(step: int) -> list[Request]:
    """All members of all groups."""
    return [Request(i, m, ids) for i, ids in enumerate(prompts(step)) for m in range(GROUP)]


def graded(completion: Completion, ids: tuple[int, ...]) -> Sample:
    """The sample with its reward, the share of even ids."""
    reward = float(np.mean(completion.tokens % 2 == 0))
    return Sample({}, "", ids, completion, "", Graded(0, {"even": reward}, reward, None, (), 0.0))


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """Waits for this process's turn where BENCH_LOCK names a file, and lets the others have theirs."""
    if not (path := os.environ.get("BENCH_LOCK")):
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    time.sleep(0.5)


class Bench:
    """The policy, its state and the programs of one step."""

    def __init__(self, row_tokens: int, rows: int, n_slots: int) -> None:
        mesh = sharding.make_mesh({"data": -1})
        lays = sharding.layouts(mesh)
        self.layout = lays["train"]
        params = run.random_params(MODEL, self.layout, 0)
        self.policy = run.Policy(MODEL, params, None, None)
        self.reference = jax.tree.map(jnp.copy, params)
        self.objective = grpo.GrpoConfig(kl_coef=1e-3)
        optimizer = optim.make_optimizer(optim.OptimConfig(learning_rate=1e-4), params)
        self.state, _ = run.training_state(self.policy, self.layout, optimizer)
        program = updates.Program(config=MODEL, layout=self.layout, scan_unroll=MODEL.num_hidden_layers)
        self.update = updates.make_rl_update(program, self.objective, optimizer, row_tokens + 1)
        self.score = updates.make_score(program)
        self.to_decode = loops.decode_layout(self.policy, lays["decode"], "float32")
        self.shape = minibatches.Shape(row_tokens, rows, True, False)
        settings = slots.SamplerConfig(slots=n_slots, tokens_per_dispatch=NEW_TOKENS, cache_bucket=64)
        self.verbs = slots.Verbs(MODEL, settings, draw.DrawConfig(), lays["decode"], [])

    def step(self, step: int) -> dict[str, float]:
        """Seconds of rollout, reference scoring, update and the whole."""
        clock = [time.perf_counter()]
        weights = self.to_decode(self.state["policy"])
        ids = prompts(step)
        key = jax.random.fold_in(jax.random.key(0), step)
        groups: list[list[Sample]] = [[] for _ in ids]
        for completion in sampler.sample(self.verbs, weights, requests(step), key, NEW_TOKENS):
            groups[completion.prompt].append(graded(completion, ids[completion.prompt]))
        assert all(len(s.completion.tokens) == NEW_TOKENS for group in groups for s in group)
        clock.append(time.perf_counter())
        items = minibatches.with_advantages(groups, self.objective, NEW_TOKENS)
        arrays, n = minibatches.pack([i for g in items for i in g], self.shape, self.objective, NEW_TOKENS)
        batch = run.put_rows(arrays, self.layout)
        batch["ref_logp"] = jax.block_until_ready(self.score(self.reference, batch, n))
        clock.append(time.perf_counter())
        self.state, sums = self.update(self.state, batch, n)
        assert np.isfinite(float(sums["loss"]))
        jax.block_until_ready(self.state)
        clock.append(time.perf_counter())
        names = ("rollout_s", "ref_s", "update_s")
        return {name: clock[i + 1] - clock[i] for i, name in enumerate(names)} | {"step_s": clock[-1] - clock[0]}

    def generate(self, limits: list[int], longest: int) -> float:
        """Tokens per second when request i may draw limits[i] tokens and the sampler is ready for `longest`."""
        weights = self.to_decode(self.state["policy"])
        todo = [dataclasses.replace(r, max_tokens=n) for r, n in zip(requests(0), limits, strict=True)]
        speeds = []
        for attempt in range(4):
            start = time.perf_counter()
            tokens = sum(
                len(c.tokens) for c in sampler.sample(self.verbs, weights, todo, jax.random.key(attempt), longest)
            )
            speeds.append(tokens / (time.perf_counter() - start))
        return statistics.median(speeds[1:])  # the first compiles


def static_batches(bench: Bench, limits: list[int], n_slots: int, shrinks: bool) -> float:
    """Tokens per second when each batch waits for its longest completion before the next one starts.

    A static batch keeps its size; with `shrinks` our sampler makes it smaller as completions end.
    """
    if not shrinks:
        with mock.patch.object(sampler._Loop, "_batch_sizes", staticmethod(lambda slots, rows: [slots])):
            return static_batches(bench, limits, n_slots, True)
    weights = bench.to_decode(bench.state["policy"])
    todo = [dataclasses.replace(r, max_tokens=n) for r, n in zip(requests(0), limits, strict=True)]
    speeds = []
    for attempt in range(4):
        start, tokens = time.perf_counter(), 0
        for first in range(0, len(todo), n_slots):
            batch = todo[first : first + n_slots]
            tokens += sum(
                len(c.tokens) for c in sampler.sample(bench.verbs, weights, batch, jax.random.key(attempt), NEW_TOKENS)
            )
        speeds.append(tokens / (time.perf_counter() - start))
    return statistics.median(speeds[1:])


def main() -> None:
    """Times the steps after warm-up and writes the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after two for warm-up")
    parser.add_argument("--row_tokens", type=int, default=288, help="length of a packed row")
    parser.add_argument("--rows", type=int, default=8, help="packed rows per microbatch")
    parser.add_argument("--slots", type=int, default=512, help="completions decoded side by side")
    parser.add_argument("--cpu_devices", type=int, default=2, help="as how many devices the CPU counts")
    parser.add_argument("--generation", action="store_true", help="time generation alone: lengths, refilling")
    args = parser.parse_args()
    hosts.initialize(args.cpu_devices)
    if args.generation:
        return generation()
    bench = Bench(args.row_tokens, args.rows, args.slots)
    rows = []
    startup_s = 0.0
    for step in range(2 + args.steps):
        with turn():
            rows.append(bench.step(step))
        startup_s = startup_s or time.perf_counter() - START_S
        shown = "  ".join(f"{name} {value:6.2f}" for name, value in rows[-1].items())
        print(f"step {step}: {shown}", flush=True)
    result = {name: statistics.median(row[name] for row in rows[2:]) for name in rows[0]}
    result["rollout_tokens_per_s"] = PROMPTS * GROUP * NEW_TOKENS / result["rollout_s"]
    result["peak_rss_gb"], result["startup_s"] = hosts.peak_rss_gb(), startup_s
    hosts.atomic_write(LATEST, json.dumps({k: round(v, 3) for k, v in result.items()}, indent=1) + "\n")
    print(json.dumps({k: round(v, 3) for k, v in result.items()}))


def generation() -> None:
    """Prints what raising the maximum length costs, and what refilling wins over a static batch."""
    bench = Bench(160, 16, 128)
    short = [NEW_TOKENS] * PROMPTS * GROUP
    once, raised = bench.generate(short, NEW_TOKENS), bench.generate(short, 16 * NEW_TOKENS)
    print(
        f"64 tokens each, maximum 64: {once:,.0f} tokens/s; maximum 1,024: {raised:,.0f} ({raised / once:.2f})",
        flush=True,
    )
    rng = random.Random(0)
    spread = [rng.randint(1, NEW_TOKENS) for _ in short]
    refilled = bench.generate(spread, NEW_TOKENS)
    static, shrinking = (static_batches(bench, spread, 128, shrinks) for shrinks in (False, True))
    print(
        f"lengths 1 to 64: refilled {refilled:,.0f} tokens/s, static {static:,.0f} ({refilled / static:.2f}), "
        f"static that shrinks {shrinking:,.0f} ({refilled / shrinking:.2f})",
        flush=True,
    )


if __name__ == "__main__":
    main()
