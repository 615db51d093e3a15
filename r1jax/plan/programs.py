"""The programs of the RL loop as a run calls them, with shapes where a run has arrays, ready to be compiled.

They come from the run's own factories (reinforce.programs, run.state_like). Around each stands what else
lies on the devices at that moment of the loop, since a program that fits alone may not fit there.
"""

import dataclasses
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from r1jax import flops, reinforce, run, sharding
from r1jax.model import lora, transformer
from r1jax.model.config import ModelConfig
from r1jax.model.kernels import flash
from r1jax.sampler import buckets
from r1jax.sharding import laid_out

Tree = Any  # of jax.ShapeDtypeStruct, each with its sharding
Compiled = Mapping[str, Any]  # name of a program -> shardings of its results, of those before it


@dataclasses.dataclass(frozen=True)
class Program:
    """One program and its place in the loop.

    Attributes:
        lower: makes the program for the compiler, given those compiled before it.
        calls: in a rollout and its updates; whole numbers only on average.
        trips: of its loops whose length the compiler cannot know.
        flops: of the model in one call, over all devices.
        takes: its arguments by kind: parameters, optimizer, reference, cache, batch, ...
        beside: what else lies on the devices, by kind.
        gives: of what it computes, what has a kind of its own.
        tokens: it reads or writes in one call.
        shares: see estimate.cost.
        hauled: bytes that one call has moved between a device and its host's memory, which the compiler does not time.
    """

    name: str
    lower: Callable[[Compiled], Any]
    calls: float
    trips: int
    flops: float
    tokens: float
    takes: dict[str, Tree]
    beside: dict[str, Tree]
    gives: dict[str, Tree] = dataclasses.field(default_factory=dict)
    shares: dict[str, float] = dataclasses.field(default_factory=dict)
    hauled: float = 0.0


@dataclasses.dataclass(frozen=True)
class Load:
    """What a rollout is assumed to hold; none of it is known before the run.

    Attributes:
        completion_tokens: mean of all completions.
        prompt_tokens: mean of all prompts.
    """

    completion_tokens: float
    prompt_tokens: float


@dataclasses.dataclass(frozen=True)
class Loop:
    """All programs of one layout and what they do in a rollout."""

    programs: tuple[Program, ...]
    updates: int  # per rollout
    completions: int  # per rollout
    load: Load
    schedule_updates: int  # of the whole run
    longest: int  # completion, in tokens


def _bytes(tree: Tree, memory: str) -> float:
    leaves = (a for a in jax.tree.leaves(tree) if sharding.memory(a.sharding) == memory)
    return float(sum(np.prod(a.sharding.shard_shape(a.shape), dtype=float) * a.dtype.itemsize for a in leaves))


def device_bytes(tree: Tree) -> float:
    """Bytes of a tree on one device."""
    return _bytes(tree, "device")


def host_bytes(tree: Tree) -> float:
    """Bytes of a tree that one device has in its host's memory."""
    return _bytes(tree, "host")


def abstract_policy(config: Any, model: ModelConfig, layout: sharding.Layout) -> run.Policy:
    """A policy whose weights are shapes with shardings; with adapters the frozen ones are bfloat16, as released."""
    adapting = run.adapting(model, config.lora)
    lies = run.param_shardings(model, layout)
    tokenizer = types.SimpleNamespace(eos_ids=frozenset({1}))
    if adapting is None:
        return run.Policy(model, laid_out(transformer.shapes(model), lies), tokenizer, None)
    small = jax.tree.map(lambda _: layout.sharding(), lora.shapes(model, adapting))
    frozen = laid_out(transformer.shapes(model, jnp.bfloat16), lies)
    return run.Policy(model, laid_out(lora.shapes(model, adapting), small), tokenizer, None, adapting, frozen)


def _slots(verbs: Any, slots: int, length: int) -> Tree:
    """Shapes of the sampler's state, laid out as slots.py does."""
    like = jax.eval_shape(lambda: verbs._empty(slots, length))
    axes = transformer.ATTENTION[verbs.model.attention].CACHE_AXES

    def one(path: tuple, a: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        named = axes.get(getattr(path[-1], "key", None), ("rows", *(None,) * (a.ndim - 1)))
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=verbs.layout.sharding(*named))

    return jax.tree_util.tree_map_with_path(one, like)


def loop(config: Any, model: ModelConfig, layouts: dict[str, sharding.Layout], load: Load) -> Loop:
    """The programs of `config`'s RL loop for a model under two layouts.

    Raises:
        ValueError: a setting that cannot be, or a dimension that does not divide (config.mesh.*, config.sampler.*).
    """
    policy = abstract_policy(config, model, layouts["train"])
    made = reinforce.programs(config, policy, layouts)
    settings = made.settings
    state = run.state_like(policy, layouts["train"], made.optimizer, made.optimizing.moments_on)
    always = {"parameters": state["policy"], "optimizer": state["optim"]}
    lies = jax.tree.map(lambda a: a.sharding, state["policy"])
    scored = laid_out(jax.eval_shape(made.to_score, state["policy"]), lies)
    if made.objective.kl_coef:
        always["reference"] = laid_out(scored, sharding.in_memory(lies, settings.reference_on, "rl.reference_on"))
    if policy.frozen is not None:
        always["frozen"] = policy.frozen
    return Loop(
        (
            *_rollout(config, policy, made, layouts["decode"], always, load),
            *_training(policy, made, state, scored, layouts["train"], always, load),
        ),
        settings.minibatches,
        settings.prompts_per_rollout * settings.group_size,
        load,
        settings.updates,
        settings.longest,
    )


def _grouped(made: reinforce.Programs, layout: sharding.Layout) -> dict[str, float]:
    """Of the rows that experts have room for, those that come."""
    return {"grouped": 1 / made.verbs.paths.expert_slack if layout.size("experts") > 1 else 1.0}


def _fullness(lengths: list[int], prompt_tokens: int, longest: int, steps: float) -> float:
    """How far from the shortest cache to the longest a step's is, on average.

    The cache grows with the longest completion that is drawn; once that is done, and others still wait, it stays.
    """
    if len(lengths) == 1:
        return 1.0
    at = np.searchsorted(lengths, np.arange(prompt_tokens, prompt_tokens + longest) + 1)
    held = np.asarray(lengths)[np.minimum(at, len(lengths) - 1)].sum() + (steps - longest) * lengths[-1]
    return float((held / steps - lengths[0]) / (lengths[-1] - lengths[0]))


def _rollout(
    config: Any,
    policy: run.Policy,
    made: reinforce.Programs,
    layout: sharding.Layout,
    always: dict[str, Tree],
    load: Load,
) -> list[Program]:
    settings, verbs, model = made.settings, made.verbs, policy.config
    sizes, prompts = verbs.config, settings.prompts_per_rollout
    n_slots, n_rows = sizes.slots, sizes.prefill_prompts
    completions = prompts * settings.group_size
    prompt_length = -(-config.data.max_prompt_tokens // 16) * 16
    lengths = buckets(max(sizes.cache_bucket, prompt_length + 16), settings.longest + config.data.max_prompt_tokens)
    is_waiting = completions > n_slots
    filled = lengths[-1] if is_waiting else lengths[0]  # the cache when prompts come in
    # No rollout ends before its longest completion.
    steps = max(float(settings.longest), completions * load.completion_tokens / n_slots)
    full = _fullness(lengths, round(load.prompt_tokens), settings.longest, steps)
    dispatches = steps / sizes.tokens_per_dispatch

    def like(shape: tuple[int, ...], dtype: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(*axes))

    def decoding(to_decode: Callable, kind: str) -> Tree:
        return laid_out(jax.eval_shape(to_decode, policy.params), run.param_shardings(model, layout, kind))

    to_decode, weights = made.to_decode, decoding(made.to_decode, sizes.weights)
    prompt, length = like((n_rows, prompt_length), jnp.int32), like((n_rows,), jnp.int32)
    columns = [like((n_slots,), jnp.int32)] * 4
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = like(key.shape, key.dtype)
    scalar = like((), jnp.int32)
    slots = {n: _slots(verbs, n_slots, n) for n in lengths}

    def prefix(done: Compiled) -> Tree:
        return laid_out(jax.eval_shape(verbs.prefill, weights, prompt, length), done["prefill"])

    programs = [
        Program(
            "layout",
            lambda done: to_decode.func.lower(policy.params, **to_decode.keywords),
            calls=1,
            trips=1,
            flops=0.0,
            tokens=0,
            takes={"parameters": policy.params, **({} if policy.frozen is None else {"frozen": policy.frozen})},
            beside={k: v for k, v in always.items() if k not in ("parameters", "frozen")},
            gives={"weights": weights},
        ),
        Program(
            "prefill",
            lambda done: verbs.prefill.lower(weights, prompt, length),
            calls=math.ceil(prompts / n_rows),
            trips=1,
            flops=flops.forward(model, n_rows * prompt_length, prompt_length / 2),
            tokens=n_rows * prompt_length,
            takes={"weights": weights},
            beside={**always, "cache": slots[filled]},
            shares=_grouped(made, layout),
        ),
        Program(
            "insert",
            lambda done: verbs.insert.lower(slots[filled], prefix(done), *columns, key),
            calls=max(math.ceil(prompts / n_rows), completions / (n_slots * sizes.refill_share) if is_waiting else 0),
            trips=1,
            flops=0.0,
            tokens=0,
            takes={"cache": slots[filled]},
            beside={**always, "weights": weights},
        ),
    ]
    if len(lengths) > 1:
        programs.append(
            Program(
                "resize",
                lambda done: verbs.resize.lower(slots[lengths[-2]], None, lengths[-1]),
                calls=len(lengths) - 1,
                trips=1,
                flops=0.0,
                tokens=0,
                takes={"cache": slots[lengths[-2]]},
                beside={**always, "weights": weights},
                gives={"cache": slots[lengths[-1]]},
            )
        )

    def generate(name: str, weights: Tree, tokens: int, calls: float) -> Program:
        return Program(
            name,
            lambda done: verbs.generate.lower(weights, slots[tokens], like((n_slots,), bool), scalar, scalar),
            calls=calls,
            trips=sizes.tokens_per_dispatch,
            flops=flops.decode(model, n_slots * sizes.tokens_per_dispatch, tokens),
            tokens=n_slots * sizes.tokens_per_dispatch,
            takes={"weights": weights, "cache": slots[tokens]},
            beside=always,
            shares=_grouped(made, layout),
        )

    # The cache grows as completions do. A dispatch is priced over the shortest and over the longest, and every other is
    # taken as so much of the one and so much of the other.
    if short := (1 - full) * dispatches:
        programs.append(generate("generate_short", weights, lengths[0], short))
    programs.append(generate("generate", weights, lengths[-1], full * dispatches))
    if sizes.weights and config.eval.problems:
        # No part of a rollout, but it has to fit: evaluation does not quantize.
        programs.append(generate("evaluate", decoding(made.to_measure, ""), lengths[-1], 0))
    return programs


def _training(
    policy: run.Policy,
    made: reinforce.Programs,
    state: Tree,
    scored: Tree,
    layout: sharding.Layout,
    always: dict[str, Tree],
    load: Load,
) -> list[Program]:
    settings, shape, model = made.settings, made.shape, policy.config
    items = settings.prompts_per_update * settings.group_size
    batch = reinforce.minibatch_like(made, model, layout)
    # Rows are taken to be full, and prompts to be read once in each row that has some of their completions.
    prompts = settings.prompts_per_update if settings.share_prompt else items
    tokens = items * load.completion_tokens + prompts * load.prompt_tokens
    trips = max(1, round(tokens / (shape.rows * shape.row_tokens) + 0.499))
    read = trips * shape.rows * shape.row_tokens
    keys = min(load.completion_tokens + load.prompt_tokens, shape.row_tokens) / 2
    work = flops.forward(model, tokens, keys)
    # Sequences taken to be alike; of blocks of keys, which are read whole, half of one is in vain on average.
    shares = {"attention": min(1.0, (2 * keys + flash.KEYS) / shape.row_tokens), **_grouped(made, layout)}
    n = jax.ShapeDtypeStruct((), jnp.int32, sharding=layout.sharding())
    flag = jax.ShapeDtypeStruct((), jnp.bool_, sharding=layout.sharding())
    batches = [batch] * settings.minibatches  # all of a rollout are packed before the first update
    unscored = {k: v for k, v in batch.items() if k not in reinforce.SCORED}

    def beside(*taken: str) -> dict[str, Tree]:
        return {**{k: v for k, v in always.items() if k not in taken}, "batch": batches[1:]}

    by_reference = settings.minibatches if "reference" in always else 0
    by_old = settings.minibatches - 1 if settings.old_logp == "policy" else 0
    frozen = {"frozen": policy.frozen} if policy.frozen is not None else {}
    programs = []
    if calls := by_reference + by_old:
        # Whose weights are scored lie there in the compute dtype: the reference's as they are kept, or fetched from
        # host memory once for all; the policy's as a copy, adapters apart.
        takes, others = {"reference": scored}, ["reference"]
        if by_old and not frozen:
            takes, others = {"weights": scored}, []
        is_away = host_bytes(always.get("reference"))
        away = {"reference": [always["reference"], *([scored] if "weights" in takes else [])]} if is_away else {}
        programs.append(
            Program(
                "score",
                lambda done: made.score.func.lower(scored, unscored, n, **made.score.keywords),
                calls=calls,
                trips=trips,
                flops=work,
                tokens=read,
                shares=shares,
                takes={**takes, **frozen, "batch": unscored},
                beside=beside(*others, "frozen") | away,
                hauled=host_bytes(away) / calls,
            )
        )
    programs.append(
        Program(
            "update",
            lambda done: made.update.func.lower(state, batch, n, flag, **made.update.keywords),
            calls=settings.minibatches,
            trips=trips,
            flops=flops.BACKWARD * work,
            tokens=read,
            shares=shares,
            takes={"parameters": state["policy"], "optimizer": state["optim"], **frozen, "batch": batch},
            beside=beside("parameters", "optimizer", "frozen"),
            gives={"gradients": jax.tree.map(_float32, state["policy"])},
            hauled=2 * host_bytes(state["optim"]),  # there and back
        )
    )
    return programs


def _float32(a: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, jnp.float32, sharding=a.sharding)
