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
import types
from collections.abc import Callable, Iterator
from concurrent import futures
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import base
from r1jax import hosts, minibatches, reinforce, run, sampler, sharding
from r1jax.model.config import ModelConfig
from r1jax.rewards.pool import Graded
from r1jax.rollout import Sample
from r1jax.types import Completion, Request

PROMPTS, PROMPT_TOKENS, GROUP, NEW_TOKENS, VOCAB = 32, 32, 16, 64, 512
# For refilling: completions per slot, as in the report's rollout (8,192 outputs) over the default of 512 slots.
SLOTS, WAVES = 128, 16
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


def spread_requests() -> list[Request]:
    """WAVES requests a slot, each with a limit of its own from 1 to NEW_TOKENS."""
    rng, steps = random.Random(0), SLOTS * WAVES // (PROMPTS * GROUP)
    return [
        dataclasses.replace(r, prompt=step * PROMPTS + r.prompt, max_tokens=rng.randint(1, NEW_TOKENS))
        for step in range(steps)
        for r in requests(step)
    ]


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


def settings(row_tokens: int, rows: int, n_slots: int) -> ConfigDict:
    """The fixed work as a config."""
    config = base.get_config()
    config.model.scan_unroll = MODEL.num_hidden_layers
    config.data.max_prompt_tokens = PROMPT_TOKENS
    config.sampler.update({"slots": n_slots, "tokens_per_dispatch": NEW_TOKENS})
    config.rl.update({"updates": 1, "minibatches": 1, "prompts_per_update": PROMPTS, "group_size": GROUP})
    config.rl.update({"max_completion_tokens": NEW_TOKENS, "row_tokens": row_tokens, "microbatch_rows": rows})
    config.optim.learning_rate = 1e-4
    return config


class Bench:
    """The policy, its state and the programs of one step."""

    def __init__(self, row_tokens: int, rows: int, n_slots: int) -> None:
        lays = sharding.layouts(sharding.make_mesh({"data": -1}))
        self.layout = lays["train"]
        params = run.random_params(MODEL, self.layout, 0)
        policy = run.Policy(MODEL, params, types.SimpleNamespace(eos_ids=frozenset()), None)
        self.made = reinforce.programs(settings(row_tokens, rows, n_slots), policy, lays)
        self.reference = self.made.to_score(jax.tree.map(jnp.copy, params))
        like = run.state_like(policy, self.layout, self.made.optimizer, "device")
        self.state = run.first_state(policy, self.layout, self.made.optimizer, "device")
        # As in a run: what follows the first rollout is compiled beside it.
        compiler = futures.ThreadPoolExecutor(1)
        self.compiling = compiler.submit(reinforce.compile_training, self.made, policy, self.layout, like)

    def step(self, step: int) -> dict[str, float]:
        """Seconds of rollout, reference scoring, update and the whole."""
        clock = [time.perf_counter()]
        made, weights = self.made, self.made.to_decode(self.state["policy"])
        ids = prompts(step)
        key = jax.random.fold_in(jax.random.key(0), step)
        groups: list[list[Sample]] = [[] for _ in ids]
        asked = {"with_experts": made.shape.replay}
        for completion in sampler.sample(made.verbs, weights, requests(step), key, NEW_TOKENS, **asked):
            groups[completion.prompt].append(graded(completion, ids[completion.prompt]))
        assert all(len(s.completion.tokens) == NEW_TOKENS for group in groups for s in group)
        clock.append(time.perf_counter())
        self.compiling.result()
        items = minibatches.with_advantages(groups, made.objective, NEW_TOKENS)
        arrays, n = minibatches.pack([i for g in items for i in g], made.shape, made.objective, NEW_TOKENS)
        batch = run.put_rows(arrays, self.layout)
        ref_logp = jax.block_until_ready(made.score(self.reference, batch, n))
        clock.append(time.perf_counter())
        batch |= {"ref_logp": ref_logp, "old_logp": batch["sampler_logp"]}
        self.state, sums = made.update(self.state, batch, n, True)
        assert np.isfinite(float(sums["loss"]))
        jax.block_until_ready(self.state)
        clock.append(time.perf_counter())
        names = ("rollout_s", "ref_s", "update_s")
        return {name: clock[i + 1] - clock[i] for i, name in enumerate(names)} | {"step_s": clock[-1] - clock[0]}

    def generate(self, batches: list[list[Request]], longest: int) -> float:
        """Tokens per second, one batch after the other, by a sampler that is ready for `longest` tokens."""
        self.compiling.result()
        weights = self.made.to_decode(self.state["policy"])
        speeds = []
        for attempt in range(4):
            start, tokens = time.perf_counter(), 0
            for batch in batches:
                drawn = sampler.sample(self.made.verbs, weights, batch, jax.random.key(attempt), longest)
                tokens += sum(len(completion.tokens) for completion in drawn)
            speeds.append(tokens / (time.perf_counter() - start))
        return statistics.median(speeds[1:])  # the first compiles


def main() -> None:
    """Times the steps after warm-up and writes the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after two for warm-up")
    parser.add_argument("--row_tokens", type=int, default=288, help="length of a packed row")
    parser.add_argument("--rows", type=int, default=8, help="packed rows per microbatch")
    parser.add_argument("--slots", type=int, default=512, help="completions decoded side by side")
    parser.add_argument("--cpu_devices", type=int, default=2, help="as how many devices the CPU counts")
    parser.add_argument("--generation", action="store_true", help="time generation alone: lengths, refilling")
    parser.add_argument("--limit", action="store_true", help="time the matrix products of a step and nothing else")
    args = parser.parse_args()
    hosts.initialize(args.cpu_devices)
    if args.limit:
        return limit(args.row_tokens * args.rows, args.slots)
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
    bench = Bench(160, 16, SLOTS)
    same = [dataclasses.replace(r, max_tokens=NEW_TOKENS) for r in requests(0)]
    once, raised = bench.generate([same], NEW_TOKENS), bench.generate([same], 16 * NEW_TOKENS)
    print(
        f"64 tokens each, maximum 64: {once:,.0f} tokens/s; maximum 1,024: {raised:,.0f} ({raised / once:.2f})",
        flush=True,
    )
    spread = spread_requests()
    refilled = bench.generate([spread], NEW_TOKENS)
    # A static batch waits for its longest completion, and keeps its size; ours would shrink as completions end.
    batches = [spread[first : first + SLOTS] for first in range(0, len(spread), SLOTS)]
    with mock.patch.object(sampler._Loop, "_batch_sizes", staticmethod(lambda slots, rows: [slots])):
        static = bench.generate(batches, NEW_TOKENS)
    shrinking = bench.generate(batches, NEW_TOKENS)
    print(
        f"{len(spread):,} completions of 1 to 64 tokens, {SLOTS} slots: refilled {refilled:,.0f} tokens/s, "
        f"static {static:,.0f} ({refilled / static:.2f}), static that shrinks {shrinking:,.0f} "
        f"({refilled / shrinking:.2f})",
        flush=True,
    )


def limit(train_tokens: int, decode_rows: int) -> None:
    """Prints what the products of activations with weights alone would take of each part: a bound from below.

    Attention's own products, norms, the optimizer, sampling and everything on the host come on top.
    """
    layout = sharding.layouts(sharding.make_mesh({"data": -1}))["train"]
    d, f, key = MODEL.hidden_size, MODEL.intermediate_size, jax.random.key(0)
    shapes = ((d, 3 * d), (d, d), (d, 2 * f), (f, d))  # query, key and value together; gate and up together
    layer = [jax.random.normal(key, shape) / shape[0] ** 0.5 for shape in shapes]
    weights = [layer] * MODEL.num_hidden_layers, jax.random.normal(key, (d, VOCAB))

    def forward(weights: tuple, x: jax.Array) -> jax.Array:
        layers, head = weights
        for qkv, out, gate_up, down in layers:
            x = (x @ qkv)[:, :d] @ out
            x = (x @ gate_up)[:, :f] @ down
        return (x @ head).sum()

    def seconds(function: Callable, tokens: int) -> float:
        x = jax.device_put(jnp.ones((tokens, d)), layout.sharding("rows", None))
        run_once, times = jax.jit(function), []
        for _ in range(20):
            start = time.perf_counter()
            jax.block_until_ready(run_once(weights, x))
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:]) / tokens

    sampled = PROMPTS * GROUP * NEW_TOKENS
    read = sampled + PROMPTS * PROMPT_TOKENS  # a group's prompt once
    parts = {
        "rollout": seconds(forward, decode_rows) * sampled,
        "reference": seconds(forward, train_tokens) * read,
        "update": seconds(jax.value_and_grad(forward, argnums=(0, 1)), train_tokens) * read,
    }
    print("matrix products alone:", "  ".join(f"{name} {value:.1f} s" for name, value in parts.items()))
    print(f"together {sum(parts.values()):.1f} s; a rollout at that speed, {sampled / parts['rollout']:,.0f} tokens/s")


if __name__ == "__main__":
    main()
