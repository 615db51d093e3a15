"""AdamW or Muon with warm-up and decay, clipped and guarded against non-finite steps, and the router-bias rule.

AdamW: arXiv 1711.05101; Muon as in arXiv 2502.16982. The published optimizer settings are DeepSeek-V3's (arXiv
2412.19437, section 4.2); its balancing of experts without an auxiliary loss (section 2.1.2) is `router_bias_update`.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, Int, Num
from optax.contrib import MuonDimensionNumbers, muon

from r1jax import layerwise, sharding
from r1jax.types import Params

# share of the way from the end of the warm-up to decay_steps -> share of the way from learning_rate to its final share
SCHEDULES: dict[str, Callable[[Array], Array]] = {
    "constant": jnp.zeros_like,
    "cosine": lambda progress: 0.5 * (1 - jnp.cos(math.pi * progress)),
}


OPTIMIZERS = ("adamw", "muon")
MUON_RMS = 0.2  # of an update at learning rate 1: about AdamW's, so that its learning rates serve (arXiv 2502.16982)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule; steps are optimizer steps."""

    learning_rate: float = 3e-6
    optimizer: str = "adamw"
    warmup_steps: int = 0
    schedule: str = "constant"
    decay_steps: int = 0  # the step at which a decaying schedule arrives, warm-up included; it stays there
    final_share: float = 0.1  # of learning_rate, at decay_steps
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip_norm: float = 1.0
    moments_dtype: str = "float32"  # between steps
    moments_on: str = "device"  # between steps, of sharding.MEMORIES
    non_finite_limit: int = 10  # skipped steps in a row before the run stops

    def __post_init__(self) -> None:
        for key, choices in (
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("moments_dtype", ("float32", "bfloat16")),
            ("moments_on", sharding.MEMORIES),
        ):
            if (value := getattr(self, key)) not in choices:
                near = difflib.get_close_matches(str(value), choices, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"optim.{key} is {value!r}, wanted one of {', '.join(choices)}{hint}")
        if self.schedule != "constant" and self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"optim.schedule {self.schedule!r} needs optim.decay_steps above optim.warmup_steps, "
                f"got {self.decay_steps} and {self.warmup_steps}"
            )
        for key in ("learning_rate", "warmup_steps", "final_share", "weight_decay"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"optim.{key} is {getattr(self, key)}, wanted zero or more")
        for key in ("grad_clip_norm", "eps", "non_finite_limit"):
            if not getattr(self, key) > 0:
                raise ValueError(f"optim.{key} is {getattr(self, key)}, wanted above zero")
        for key in ("b1", "b2"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"optim.{key} is {getattr(self, key)}, wanted at least 0 and below 1")


def schedule(config: OptimConfig) -> Callable[[ArrayLike], Float[Array, ""]]:
    """Learning rate as a function of the step, counted from 0; linear warm-up, whose first step already learns."""

    def learning_rate(step: ArrayLike) -> Float[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        warmup = jnp.minimum((step + 1) / max(config.warmup_steps, 1), 1)
        span = max(config.decay_steps - config.warmup_steps, 1)
        progress = jnp.clip((step - config.warmup_steps) / span, 0, 1)
        decay = 1 - (1 - config.final_share) * SCHEDULES[config.schedule](progress)
        return config.learning_rate * warmup * decay

    return learning_rate


def stored_as(step: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """The same optimizer with its moments kept in `dtype` between steps; within a step they are float32.

    DeepSeek-V3 (section 3.3.3) keeps both in bfloat16, with b2 at 0.95. With 0.999 the second moment would stand still:
    a step changes it by less than what two neighbouring numbers differ by.
    """
    if dtype == "float32":
        return step

    def cast(state: Any, dtype: str) -> Any:
        return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, state)

    def update(grads: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        updates, state = step.update(grads, cast(state, "float32"), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(step.init(params), dtype), update)


def _named(params: Params, is_true: Callable[[str], bool]) -> Any:
    # The name decides, not the rank: with layers stacked, norms and biases have two axes or three.
    return jax.tree_util.tree_map_with_path(
        lambda path, _: is_true(jax.tree_util.keystr(path[-1:], simple=True)), params
    )


# Projections to heads and from heads are matrices with two axes on one side; all others are matrices as they lie.
TO_HEADS, FROM_HEADS = ("q", "k", "v", "q_b", "k_b", "v_b"), ("o",)
# Tables of the vocabulary and routers are no maps between hidden states: arXiv 2502.16982 leaves such to AdamW.
NOT_FOR_MUON = ("embed", "head", "router")


def _muon_axes(path: tuple, leaf: Any) -> MuonDimensionNumbers | None:
    """Which axes of a weight, stacked over layers and experts, Muon takes as a matrix; None leaves it to AdamW."""
    name = jax.tree_util.keystr(path[-1:], simple=True)
    if name.endswith(("norm", "bias")) or name in NOT_FOR_MUON:
        return None
    if name in TO_HEADS:
        return MuonDimensionNumbers(leaf.ndim - 3, (leaf.ndim - 2, leaf.ndim - 1))
    if name in FROM_HEADS:
        return MuonDimensionNumbers((leaf.ndim - 3, leaf.ndim - 2), leaf.ndim - 1)
    return MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)


def _clipped(limit: float) -> optax.GradientTransformationExtraArgs:
    """optax.clip_by_global_norm for what may be a part of the gradients: the norm of all of them is given."""

    def update(grads: Params, state: Any, params: Params | None = None, *, norm: Array, **_: Any) -> tuple[Params, Any]:
        return jax.tree.map(lambda g: jnp.where(norm < limit, g, g / norm * limit), grads), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


class Offloaded(NamedTuple):
    """An optimizer whose moments lie in host memory between steps; `of` makes that of a part of the parameters."""

    init: Callable[[Params], optax.OptState]
    update: Callable[..., tuple[Params, optax.OptState]]
    of: Callable[[Params], optax.GradientTransformation]


Optimizer = optax.GradientTransformation | Offloaded


def make_optimizer(config: OptimConfig, params: Params) -> Optimizer:
    """AdamW or Muon behind a clip by the global norm; `params` (arrays or shapes) only say which leaves there are.

    Weight decay touches matrices alone, not norms or biases, and with Muon only what Muon updates. `router_bias` gets
    no update at all.
    """
    whole = _optimizer(config, params)
    return whole if config.moments_on == "device" else Offloaded(whole.init, whole.update, partial(_optimizer, config))


def _optimizer(config: OptimConfig, params: Params) -> optax.GradientTransformation:
    if config.optimizer == "muon":
        step = muon(
            schedule(config),
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            eps=config.eps,
            consistent_rms=MUON_RMS,
            muon_weight_dimension_numbers=jax.tree_util.tree_map_with_path(_muon_axes, params),
        )
    else:
        is_decayed = _named(params, lambda name: not name.endswith(("norm", "bias")))
        step = optax.adamw(
            schedule(config), config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=is_decayed
        )
    return optax.chain(
        _clipped(config.grad_clip_norm),
        stored_as(step, config.moments_dtype),
        optax.masked(optax.set_to_zero(), _named(params, lambda name: name == "router_bias")),
    )


class OptimState(NamedTuple):
    """Moments and step counts of the optimizer, and how many steps were skipped; a plain pytree."""

    moments: optax.OptState
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]


def init(optimizer: Optimizer, params: Params) -> OptimState:
    """The state before the first step; moments do not take the parameters' dtype."""
    moments = optimizer.init(jax.tree.map(lambda p: p.astype(jnp.float32), params))
    return OptimState(moments, skipped=jnp.zeros([], jnp.int32), skipped_in_a_row=jnp.zeros([], jnp.int32))


def state_like(state: OptimState, per_param: Any, scalar: Any) -> OptimState:
    """A tree shaped like `state`: `per_param`'s leaves where the moments of that parameter stand, else `scalar`.

    For shardings: `per_param` the parameters' shardings, `scalar` the replicated one.
    """
    by_path = dict(jax.tree_util.tree_leaves_with_path(per_param))

    def one(path: tuple, _: Any) -> Any:
        # The path of a moment ends with that of its parameter.
        return next((by_path[path[i:]] for i in range(len(path)) if path[i:] in by_path), scalar)

    return jax.tree_util.tree_map_with_path(one, state)


def apply(
    optimizer: Optimizer, params: Params, state: OptimState, grads: Params, loss: Float[Array, ""]
) -> tuple[Params, OptimState, dict[str, Float[Array, ""]]]:
    """One optimizer step; when the loss or the gradient's norm is not finite, nothing changes but the counts of skips.

    Returns:
        Parameters, state and metrics: optim/grad_norm (before the clip), optim/skipped (0 or 1).
    """
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    grad_norm = optax.tree.norm(grads)
    is_finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss)

    def if_finite(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: jnp.where(is_finite, n, o), new, old)

    def step(
        optimizer: optax.GradientTransformation, params: Params, before: optax.OptState, grads: Params
    ) -> tuple[Params, optax.OptState]:
        with_norm = optax.with_extra_args_support(optimizer)
        updates, moments = with_norm.update(grads, before, params, norm=grad_norm)
        return if_finite(optax.apply_updates(params, updates), params), if_finite(moments, before)

    if isinstance(optimizer, Offloaded):
        # A branch: moments come in when the gradient is there, and not while room is needed to compute it.
        taken = partial(layerwise.update, step, optimizer.of)
        params, moments = jax.lax.cond(is_finite, taken, lambda p, m, _: (p, m), params, state.moments, grads)
    else:
        params, moments = step(optimizer, params, state.moments, grads)
    skipped = jnp.where(is_finite, 0, 1)
    state = OptimState(
        moments=moments,
        skipped=state.skipped + skipped,
        skipped_in_a_row=jnp.where(is_finite, 0, state.skipped_in_a_row + 1),
    )
    metrics = {"optim/grad_norm": grad_norm, "optim/skipped": skipped.astype(jnp.float32)}
    return params, state, metrics


def check_non_finite(skipped_in_a_row: int, limit: int) -> None:
    """Stop a run that no longer learns, on the host; `limit` is optim.non_finite_limit.

    Raises:
        FloatingPointError: `limit` steps in a row were skipped.
    """
    if skipped_in_a_row >= limit:
        raise FloatingPointError(
            f"{skipped_in_a_row} optimizer steps in a row had a loss or gradient that is not finite, and were skipped; "
            f"the parameters are those from before. Lower optim.learning_rate, narrow grpo.clip_eps_high, "
            f"or look at mismatch/max and kl/mean; optim.non_finite_limit ({limit}) sets when to stop."
        )


def router_bias_update(bias: Float[Array, "L E"], load: Num[Array, "L E"], rate: float) -> Float[Array, "L E"]:
    """Raise the router bias of underloaded experts by `rate`, lower that of overloaded ones (DeepSeek-V3, 2.1.2).

    Args:
        bias: added to the routing scores for the choice of experts only.
        load: tokens of the whole batch that chose each expert, over all devices.
        rate: per step; DeepSeek-V3 took 0.001, and 0 at the end of pretraining.
    """
    load = load.astype(jnp.float32)
    return bias + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
