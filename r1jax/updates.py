"""The jitted steps: scoring of given tokens, the GRPO update, the next-token update (pretraining and SFT), and those
of models with a scalar head (reward and value models).

A minibatch is a tree of arrays [M, B, T]: microbatches of B packed rows, the first n of which hold anything. Their
gradients add up exactly to those of the whole; n is not static, so that minibatches of any size run one program.
State is donated. Each maker is called once with static settings and returns a jitted function. With adapters the
parameters are the adapters, and the frozen weights come as a further argument, `frozen`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from r1jax import grpo, optim, sharding
from r1jax.model import transformer
from r1jax.model.config import DEFAULT_PATHS, ModelConfig, Paths
from r1jax.model.lora import Lora, adapt, merge
from r1jax.model.quantize import Quantized, quantized
from r1jax.types import Params

Batch = dict[str, Array]
State = dict[str, Any]  # "policy": parameters, "optim": optim.OptimState


@dataclasses.dataclass(frozen=True)
class Program:
    """What every training program of a run shares; all of it static."""

    config: ModelConfig
    layout: sharding.Layout
    compute_dtype: str = "float32"
    remat: str = "none"
    scan_unroll: int = 1
    temperature: float = 1.0
    router_bias_rate: float = 0.0
    mtp_weight: float = 0.0
    paths: Paths = DEFAULT_PATHS
    lora: Lora | None = None  # then what is trained are adapters of frozen weights


def cast(params: Params, dtype: str) -> Params:
    """Weights in the compute dtype; the router stays float32 (model/moe.py), and quantized ones what they are."""

    def one(path: tuple, leaf: Array | Quantized) -> Array | Quantized:
        is_kept = "router" in jax.tree_util.keystr(path[-1:]) or isinstance(leaf, Quantized)
        return leaf if is_kept else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda leaf: isinstance(leaf, Quantized))


def weights_of(
    config: ModelConfig, lora: Lora | None, params: Params, frozen: Params | None, dtype: str, kind: str = ""
) -> Params:
    """The whole model's weights in the compute dtype, of what is trained and, with adapters, of what is frozen.

    Args:
        kind: of quantize.KINDS, for the large matrices; empty: the compute dtype as well.
    """
    whole = params if lora is None else merge(frozen, params, config, lora)
    return cast(quantized(whole, kind) if kind else whole, dtype)


def init_state(params: Params, optimizer: optim.Optimizer) -> State:
    """The training state before the first step."""
    return {"policy": params, "optim": optim.init(optimizer, params)}


def state_shardings(
    shardings: Params, optimizer: optim.Optimizer, params: Params, scalar: Any, moments_on: str
) -> State:
    """Shardings of a training state: moments lie as their parameters do, in the memory that optim.moments_on names.

    Raises:
        ValueError: these devices have no such memory.
    """
    like = jax.eval_shape(partial(optim.init, optimizer), params)
    moments = sharding.in_memory(shardings, moments_on, "optim.moments_on")
    return {"policy": shardings, "optim": optim.state_like(like, moments, scalar)}


def _weights(program: Program, params: Params, frozen: Params | None) -> Params:
    dtype = program.compute_dtype
    if program.lora is None:
        return cast(params, dtype)
    return adapt(frozen, cast(frozen, dtype), params, program.config, program.lora, dtype)


def _run(program: Program, weights: Params, micro: Batch) -> transformer.Hidden:
    replay = micro.get("replay")  # [B, T, L, K]
    return transformer.hidden(
        weights,
        program.config,
        micro["tokens"],
        micro["positions"],
        micro["segments"],
        micro["parents"],
        None if replay is None else jnp.transpose(replay.astype(jnp.int32), (2, 0, 1, 3)),
        keep=("load",),
        remat=program.remat,
        unroll=program.scan_unroll,
        paths=program.paths,
    )


def _rows(layout: sharding.Layout, batch: Batch) -> Batch:
    """Microbatches as they lie on the mesh."""
    return {name: sharding.constrain(a, None, "rows", "tokens", *(None,) * (a.ndim - 3)) for name, a in batch.items()}


def make_score(program: Program) -> Callable[..., Array]:
    """Log-probabilities [M, B, T] of the targets under given parameters; zeros past the first `n` microbatches."""

    @partial(jax.jit, out_shardings=program.layout.sharding(None, "rows", "tokens"))
    def score(params: Params, batch: Batch, n: Array, frozen: Params | None = None) -> Array:
        with sharding.use(program.layout):
            batch = _rows(program.layout, batch)

            def one(i: Array, out: Array) -> Array:
                micro = jax.tree.map(lambda a: a[i], batch)
                weights = _weights(program, params, frozen)
                x = _run(program, weights, micro).x
                return out.at[i].set(transformer.token_logps(weights, x, micro["targets"], program.temperature)[0])

            return jax.lax.fori_loop(0, n, one, jnp.zeros(batch["tokens"].shape, jnp.float32))

    return score


def _accumulate(
    gradient: Callable[[Params, Batch], tuple[tuple[Array, dict], Params]], params: Params, batch: Batch, n: Array
) -> tuple[Array, dict, Params]:
    """Sums of loss, record and gradients over the first `n` microbatches."""
    first = jax.tree.map(lambda a: a[0], batch)
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradient, params, first))

    def body(i: Array, total: tuple) -> tuple:
        (loss, record), grads = gradient(params, jax.tree.map(lambda a: a[i], batch))
        (loss_so_far, record_so_far), grads_so_far = total
        record = grpo.accumulate(record_so_far, record)
        return (loss_so_far + loss, record), jax.tree.map(jnp.add, grads_so_far, grads)

    (loss, record), grads = jax.lax.fori_loop(0, n, body, zero)
    return loss, record, grads


def _step(
    program: Program, optimizer: optim.Optimizer, gradient: Callable, state: State, batch: Batch, n: Array
) -> tuple[State, dict[str, Array]]:
    loss, record, grads = _accumulate(gradient, state["policy"], _rows(program.layout, batch), n)
    policy, opt, metrics = optim.apply(optimizer, state["policy"], state["optim"], grads, loss)
    if program.router_bias_rate and program.config.router_bias:
        policy = _balance(policy, record, program.router_bias_rate)
    return {"policy": policy, "optim": opt}, {**record, **metrics, "loss": loss}


def _balance(policy: Params, record: dict[str, Array], rate: float) -> Params:
    """Moves every router's bias against its experts' load (optim.router_bias_update)."""
    policy = jax.tree.map(lambda a: a, policy)
    for name, layer in (("load", policy.get("moe")), ("mtp_load", policy.get("mtp", {}).get("layer"))):
        if name in record and layer is not None:
            moved = optim.router_bias_update(layer["mlp"]["router_bias"], record[name], rate)
            layer["mlp"]["router_bias"] = moved
    return policy


def _with_load(record: dict[str, Array], load: Array | None) -> dict[str, Array]:
    return record if load is None else {**record, "load": load}


def make_rl_update(
    program: Program, settings: grpo.GrpoConfig, optimizer: optim.Optimizer, row_sequences: int
) -> Callable[..., tuple[State, dict[str, Array]]]:
    """One GRPO step: (state, minibatch, n, is_on_policy, frozen) to (state, sums for grpo.finish_metrics).

    The minibatch holds the arrays of packing.py and advantage, weights, sampler_logp, ref_logp when kl_coef is set,
    old_logp, and replay for a MoE. Where `is_on_policy`, as for a rollout's first minibatch, or without old_logp, the
    policy's own log-probabilities stand for the old ones: the ratio is exactly one.
    """

    def gradient(
        params: Params, micro: Batch, is_on_policy: Array | bool, frozen: Params | None
    ) -> tuple[tuple[Array, dict], Params]:
        def loss_of(params: Params) -> tuple[Array, dict]:
            weights = _weights(program, params, frozen)
            out = _run(program, weights, micro)
            logp, entropy = transformer.token_logps(weights, out.x, micro["targets"], program.temperature)
            own = jax.lax.stop_gradient(logp)
            loss, record = grpo.loss(
                grpo.LossInputs(
                    logp=logp,
                    old_logp=jnp.where(is_on_policy, own, micro.get("old_logp", own)),
                    ref_logp=micro.get("ref_logp"),
                    sampler_logp=micro["sampler_logp"],
                    advantage=micro["advantage"],
                    weights=micro["weights"],
                    is_completion=micro["is_completion"],
                    sequence=micro["sequence"],
                ),
                settings,
                row_sequences,
            )
            record["entropy"] = jnp.where(micro["is_completion"], entropy, 0.0).sum()
            return loss, _with_load(record, out.load)

        return jax.value_and_grad(loss_of, has_aux=True)(params)

    @partial(jax.jit, donate_argnums=0)
    def update(
        state: State, batch: Batch, n: Array, is_on_policy: Array | bool = False, frozen: Params | None = None
    ) -> tuple[State, dict[str, Array]]:
        one = partial(gradient, is_on_policy=is_on_policy, frozen=frozen)
        with sharding.use(program.layout):
            return _step(program, optimizer, one, state, batch, n)

    return update


def _following(micro: Batch) -> Batch:
    """Targets one token further (multi-token prediction), where the same segment goes on."""
    ahead = {name: jnp.roll(micro[name], -1, axis=1) for name in ("targets", "segments", "is_completion")}
    inside = (ahead["segments"] == micro["segments"]) & (
        jnp.arange(micro["tokens"].shape[1]) < micro["tokens"].shape[1] - 1
    )
    return {"targets": ahead["targets"], "counted": inside & ahead["is_completion"]}


def make_sft_update(program: Program, optimizer: optim.Optimizer) -> Callable[..., tuple[State, dict[str, Array]]]:
    """One next-token step over the targets where `is_completion` is true, and multi-token prediction if it can.

    Sums returned: tokens, nll, entropy and, with multi-token prediction, mtp_nll over mtp_tokens.
    """
    config = program.config

    def gradient(
        params: Params, micro: Batch, frozen: Params | None, total: Array
    ) -> tuple[tuple[Array, dict], Params]:
        def loss_of(params: Params) -> tuple[Array, dict]:
            weights = _weights(program, params, frozen)
            out = _run(program, weights, micro)
            logp, entropy = transformer.token_logps(weights, out.x, micro["targets"])
            counted = micro["is_completion"]
            nll = -jnp.where(counted, logp, 0.0).sum()
            record = {
                "tokens": counted.sum(dtype=jnp.float32),
                "nll": nll,
                "entropy": jnp.where(counted, entropy, 0.0).sum(),
            }
            record, loss = _with_load(record, out.load), nll / total
            if config.num_nextn_predict_layers and program.mtp_weight:
                ahead = _following(micro)
                x, load = transformer.next_token_hidden(
                    weights, config, out.x, micro["targets"], micro["positions"], micro["segments"], program.paths
                )
                logp, _ = transformer.token_logps(weights, x, ahead["targets"])
                mtp = -jnp.where(ahead["counted"], logp, 0.0).sum()
                record |= {"mtp_nll": mtp, "mtp_tokens": ahead["counted"].sum(dtype=jnp.float32)}
                record |= {} if load is None else {"mtp_load": load}
                loss = loss + program.mtp_weight * mtp / total
            return loss, record

        return jax.value_and_grad(loss_of, has_aux=True)(params)

    @partial(jax.jit, donate_argnums=0)
    def update(state: State, batch: Batch, n: Array, frozen: Params | None = None) -> tuple[State, dict[str, Array]]:
        with sharding.use(program.layout):
            total = jnp.maximum(batch["is_completion"].sum(dtype=jnp.float32), 1.0)
            return _step(program, optimizer, partial(gradient, frozen=frozen, total=total), state, batch, n)

    return update


def _scores(program: Program, params: Params, micro: Batch) -> Array:
    """The scalar head's value at every position [B, T]; a head's trunk chooses its experts itself."""
    own = {name: a for name, a in micro.items() if name != "replay"}
    x = _run(program, cast(params["trunk"], program.compute_dtype), own).x
    return jnp.einsum("btd,d->bt", x.astype(jnp.float32), params["score"])


def _last_scores(program: Program, params: Params, micro: Batch) -> tuple[Array, Array]:
    """The scalar head's value at the marked position of each row [B], and which rows have one."""
    scores = _scores(program, params, micro)
    return jnp.where(micro["is_last"], scores, 0.0).sum(1), micro["is_last"].any(1)


def _pairwise(scores: Array, _: Batch) -> tuple[Array, Array]:
    """Bradley-Terry (R1 report, section 2.3.4): rows are a chosen and a rejected answer in turn."""
    gap = scores[0::2] - scores[1::2]
    return jnp.repeat(-jax.nn.log_sigmoid(gap), 2), jnp.repeat(gap > 0, 2)


def _pointwise(scores: Array, micro: Batch) -> tuple[Array, Array]:
    """Cross-entropy of each row's label."""
    label = jnp.where(micro["is_last"], micro["label"], 0.0).sum(1)
    return optax.sigmoid_binary_cross_entropy(scores, label), (scores > 0) == (label > 0.5)


REWARD_LOSSES = {"pairwise": _pairwise, "pointwise": _pointwise}


def make_reward_update(
    program: Program, optimizer: optim.Optimizer, loss: str
) -> Callable[..., tuple[State, dict[str, Array]]]:
    """One step of a reward model: {"trunk": the policy's parameters, "score": its scalar head [D]}.

    A minibatch has tokens, positions, segments, parents, is_last [M, B, T] and, for "pointwise", label. Sums returned:
    tokens, rows, right.
    """

    def gradient(params: Params, micro: Batch, total: Array) -> tuple[tuple[Array, dict], Params]:
        def loss_of(params: Params) -> tuple[Array, dict]:
            scores, counted = _last_scores(program, params, micro)
            each, right = REWARD_LOSSES[loss](scores, micro)
            record = {
                "tokens": (micro["segments"] > 0).sum(dtype=jnp.float32),
                "rows": counted.sum(dtype=jnp.float32),
                "right": jnp.where(counted, right, False).sum(dtype=jnp.float32),
            }
            return jnp.where(counted, each, 0.0).sum() / total, record

        return jax.value_and_grad(loss_of, has_aux=True)(params)

    @partial(jax.jit, donate_argnums=0)
    def update(state: State, batch: Batch, n: Array) -> tuple[State, dict[str, Array]]:
        with sharding.use(program.layout):
            total = jnp.maximum(batch["is_last"].sum(dtype=jnp.float32), 1.0)
            return _step(program, optimizer, partial(gradient, total=total), state, batch, n)

    return update


def make_reward_score(program: Program) -> Callable[[Params, Batch], Array]:
    """Scores [M, B] of the rows of a minibatch, 0 where a row is empty."""

    @partial(jax.jit, out_shardings=program.layout.sharding())
    def score(params: Params, batch: Batch) -> Array:
        with sharding.use(program.layout):
            return jax.lax.map(lambda micro: _last_scores(program, params, micro)[0], _rows(program.layout, batch))

    return score


def make_value_update(
    program: Program, optimizer: optim.Optimizer, loss: Callable[[Array, Batch], Array]
) -> Callable[..., tuple[State, dict[str, Array]]]:
    """One step of a model that values positions: {"trunk": the policy's parameters, "score": its scalar head [D]}.

    A minibatch has the arrays of packing.py, is_valued and target [M, B, T], and what `loss` reads. Sums returned over
    valued positions: tokens, target, target_squared, error_squared (of the head's value itself).

    Args:
        loss: of values [B, T] and the microbatch, one term for each position.
    """

    def gradient(params: Params, micro: Batch, total: Array) -> tuple[tuple[Array, dict], Params]:
        def loss_of(params: Params) -> tuple[Array, dict]:
            counted = micro["is_valued"]
            values, target = _scores(program, params, micro), jnp.where(counted, micro["target"], 0.0)
            sums = {
                "tokens": counted,
                "target": target,
                "target_squared": target**2,
                "error_squared": (jax.lax.stop_gradient(values) - target) ** 2,
            }
            record = {name: jnp.where(counted, a, 0.0).sum(dtype=jnp.float32) for name, a in sums.items()}
            return jnp.where(counted, loss(values, micro), 0.0).sum() / total, record

        return jax.value_and_grad(loss_of, has_aux=True)(params)

    @partial(jax.jit, donate_argnums=0)
    def update(state: State, batch: Batch, n: Array) -> tuple[State, dict[str, Array]]:
        with sharding.use(program.layout):
            total = jnp.maximum(batch["is_valued"].sum(dtype=jnp.float32), 1.0)
            return _step(program, optimizer, partial(gradient, total=total), state, batch, n)

    return update


def make_values(program: Program) -> Callable[[Params, Batch, Array], Array]:
    """The head's value at every position [M, B, T]; zeros past the first `n` microbatches."""

    @partial(jax.jit, out_shardings=program.layout.sharding(None, "rows", "tokens"))
    def values(params: Params, batch: Batch, n: Array) -> Array:
        with sharding.use(program.layout):
            batch = _rows(program.layout, batch)

            def one(i: Array, out: Array) -> Array:
                return out.at[i].set(_scores(program, params, jax.tree.map(lambda a: a[i], batch)))

            return jax.lax.fori_loop(0, n, one, jnp.zeros(batch["tokens"].shape, jnp.float32))

    return values
