"""GRPO as pure functions of arrays: advantages in a group, KL estimators, ratios, clipping, aggregation, the loss.

Group-relative advantages and the per-token objective are DeepSeekMath's (arXiv 2402.03300, section 4.1); the ratio of
whole sequences is DeepSeek-R1's formula (arXiv 2501.12948, section 2.2.1). The other variants name their source where
they stand.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Num

OVERLONG = ("none", "mask", "soft")

# Beyond exp(20) a ratio carries no information and exp soon overflows; the gradient is zero there.
MAX_LOG_RATIO = 20.0


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
    """The objective. kl_coef and kl_estimator default to the published values, the unpublished clip bounds to PPO's.

    The R1 report's formula is ratio_level and aggregation "sequence"; DeepSeekMath's, per token, is the default.
    """

    kl_coef: float = 0.001
    kl_estimator: str = "k3"
    clip_eps_low: float = 0.2
    clip_eps_high: float = 0.2
    ratio_level: str = "token"
    aggregation: str = "per_sequence_token_mean"
    importance_cap: float | None = None  # truncated importance sampling against the sampler; None: no correction
    normalize_std: bool = True
    std_ddof: int = 0
    overlong: str = "none"
    overlong_soft_tokens: int = 0

    def __post_init__(self) -> None:
        for key, table in {
            "kl_estimator": KL_ESTIMATORS,
            "ratio_level": RATIO_LEVELS,
            "aggregation": AGGREGATIONS,
            "overlong": OVERLONG,
        }.items():
            value = getattr(self, key)
            if value not in table:
                near = difflib.get_close_matches(str(value), table, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"grpo.{key} is {value!r}, wanted one of {', '.join(table)}{hint}")
        for key in ("kl_coef", "clip_eps_low", "clip_eps_high"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"grpo.{key} is {getattr(self, key)}, wanted zero or more")
        if self.importance_cap is not None and not self.importance_cap > 0:
            raise ValueError(
                f"grpo.importance_cap is {self.importance_cap}, wanted above zero, or None for no correction"
            )
        if self.overlong == "soft" and self.overlong_soft_tokens < 1:
            raise ValueError(
                f"grpo.overlong 'soft' needs grpo.overlong_soft_tokens of at least 1, got {self.overlong_soft_tokens}"
            )


# --- groups of completions: [N, G], prompts by members -------------------------------------------------------------


def masked_mean(values: Array, is_valid: Array, axis: int) -> Array:
    """Mean over `axis` of the values where `is_valid`, keeping the axis; zero where nothing is valid."""
    count = jnp.sum(is_valid, axis=axis, keepdims=True)
    return jnp.sum(jnp.where(is_valid, values, 0), axis=axis, keepdims=True) / jnp.maximum(count, 1)


def zero_variance(rewards: Num[ArrayLike, "N G"], is_valid: Bool[ArrayLike, "N G"] | None = None) -> Bool[Array, " N"]:
    """Groups whose valid rewards are all the same number (or that have none): they teach nothing."""
    rewards = jnp.asarray(rewards, jnp.float32)
    is_valid = jnp.ones_like(rewards, bool) if is_valid is None else jnp.asarray(is_valid)
    # Compared, not subtracted: the float32 mean of sixteen times 0.1 is not 0.1.
    lowest = jnp.min(jnp.where(is_valid, rewards, jnp.inf), axis=1)
    highest = jnp.max(jnp.where(is_valid, rewards, -jnp.inf), axis=1)
    return lowest >= highest


def advantages(
    rewards: Num[ArrayLike, "N G"],
    normalize_std: bool = True,
    ddof: int = 0,
    eps: float = 1e-6,
    is_valid: Bool[ArrayLike, "N G"] | None = None,
) -> Float[Array, "N G"]:
    """(reward - mean) / (std + eps) inside each group.

    Args:
        rewards: one row per prompt, one column per member of its group.
        normalize_std: divide by the group's standard deviation, as GRPO does and Dr. GRPO (arXiv 2503.20783) does not.
        ddof: the deviation divides by the number of valid members minus this.
        eps: added to the deviation.
        is_valid: members that count. The others, whatever their reward, get zero and do not move mean and deviation.

    Returns:
        Advantages; exactly zero throughout a group of equal rewards.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    is_valid = jnp.ones_like(rewards, bool) if is_valid is None else jnp.asarray(is_valid)
    has_signal = is_valid & ~zero_variance(rewards, is_valid)[:, None]
    rewards = jnp.where(is_valid, rewards, 0)
    centred = jnp.where(has_signal, rewards - masked_mean(rewards, is_valid, axis=1), 0)
    if not normalize_std:
        return centred
    freedom = jnp.maximum(jnp.sum(is_valid, axis=1, keepdims=True) - ddof, 1)
    return centred / (jnp.sqrt(jnp.sum(centred**2, axis=1, keepdims=True) / freedom) + eps)


def keep_groups(has_signal: Bool[ArrayLike, " N"], limit: int) -> Bool[Array, " N"]:
    """Dynamic sampling (DAPO, 2503.14476, section 3.2): the first `limit` groups with a signal, in the order sampled.

    The caller samples more prompts while fewer than `limit` are kept, so that the batch keeps its size.
    """
    has_signal = jnp.asarray(has_signal)
    return has_signal & (jnp.cumsum(has_signal) <= limit)


def overlong_penalty(
    lengths: Int[ArrayLike, "N G"], max_completion_tokens: int, soft_tokens: int
) -> Float[Array, "N G"]:
    """Added to the reward (DAPO, equation 13): falls from 0 to -1 over the last `soft_tokens` of the budget."""
    allowed = max_completion_tokens - soft_tokens
    return jnp.clip((allowed - jnp.asarray(lengths)) / soft_tokens, -1.0, 0.0)


def handle_overlong(
    overlong: str,
    rewards: Num[ArrayLike, "N G"],
    lengths: Int[ArrayLike, "N G"],
    is_truncated: Bool[ArrayLike, "N G"],
    max_completion_tokens: int,
    soft_tokens: int,
) -> tuple[Float[Array, "N G"], Bool[Array, "N G"]]:
    """Rewards and which completions are trained, by a value of OVERLONG (DAPO, section 3.4).

    "mask" leaves truncated completions out of the loss, "soft" adds `overlong_penalty`. What is not trained counts
    in its group's baseline, but not in the batch: neither in `is_completion` nor in the counts of `token_weights`.
    """
    rewards, is_truncated = jnp.asarray(rewards, jnp.float32), jnp.asarray(is_truncated)
    if overlong == "soft":
        rewards = rewards + overlong_penalty(lengths, max_completion_tokens, soft_tokens)
    return rewards, ~is_truncated if overlong == "mask" else jnp.ones_like(is_truncated)


# --- one value per token -------------------------------------------------------------------------------------------


def _ratio(log_ratio: Array) -> Array:
    return jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def kl_k1(logp: Array, old_logp: Array, ref_logp: Array) -> Array:
    """log(pi / ref). Unbiased in value; as a loss it only adds noise: on-policy its gradient has expectation zero."""
    return logp - ref_logp


def kl_k2(logp: Array, old_logp: Array, ref_logp: Array) -> Array:
    """Half the squared log-ratio. Biased in value; on-policy its gradient is that of KL(pi || ref), without bias."""
    return 0.5 * (logp - ref_logp) ** 2


def kl_k3(logp: Array, old_logp: Array, ref_logp: Array) -> Array:
    """ref/pi - log(ref/pi) - 1, the published choice. Unbiased in value and never negative.

    On-policy its gradient is that of the other direction, KL(ref || pi), and large where pi is far below ref.
    """
    log_ratio = jnp.clip(ref_logp - logp, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jnp.expm1(log_ratio) - log_ratio


def kl_k3_corrected(logp: Array, old_logp: Array, ref_logp: Array) -> Array:
    """k3 times pi/old with the gradient through both: value and gradient of KL(pi || ref) without bias, off-policy too.

    DeepSeek-V3.2 (arXiv 2512.02556, section 3.1). The ratio is each token's own whatever `ratio_level` says: the
    identity holds for no other.
    """
    return _ratio(logp - old_logp) * kl_k3(logp, old_logp, ref_logp)


# (logp, old_logp, ref_logp) -> KL(policy || reference) of one token drawn from old. k1 to k3: Schulman,
# joschu.net/blog/kl-approx.html; what their gradients estimate: arXiv 2510.01555.
KL_ESTIMATORS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "k1": kl_k1,
    "k2": kl_k2,
    "k3": kl_k3,
    "k3_corrected": kl_k3_corrected,
}


def sequence_sums(values: Num[Array, "B T"], sequence: Int[Array, "B T"], row_sequences: int) -> Num[Array, "B T"]:
    """At every token, the sum of `values` over its sequence; ids count from 0 to `row_sequences` - 1 in each row."""
    sums = jax.vmap(lambda v, s: jax.ops.segment_sum(v, s, num_segments=row_sequences))(values, sequence)
    return jnp.take_along_axis(sums, sequence, axis=1)


# (log-ratio of each token, its sum over the sequence, tokens in the sequence) -> log-ratio that is clipped.
RATIO_LEVELS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "token": lambda token, total, length: token,  # DeepSeekMath
    "sequence": lambda token, total, length: total,  # the R1 report
    "sequence_mean": lambda token, total, length: total / length,  # GSPO, arXiv 2507.18071, equation 7
}


class Clipped(NamedTuple):
    """A clipped objective and where the clipping binds: there the gradient is zero."""

    objective: Float[Array, "B T"]
    is_low: Bool[Array, "B T"]
    is_high: Bool[Array, "B T"]


def clipped_objective(
    ratio: Float[Array, "B T"], advantage: Float[Array, "B T"], clip_eps_low: float, clip_eps_high: float
) -> Clipped:
    """min(ratio * A, clip(ratio, 1 - clip_eps_low, 1 + clip_eps_high) * A) (PPO; two bounds: DAPO, section 3.1).

    The lower bound binds only where A < 0, the upper only where A > 0.
    """
    is_low = (ratio < 1 - clip_eps_low) & (advantage < 0)
    is_high = (ratio > 1 + clip_eps_high) & (advantage > 0)
    # Selected rather than min(): at a tie min() would halve the gradient, and with clip_eps 0 every first ratio ties.
    bounded = jnp.where(is_low, 1 - clip_eps_low, jnp.where(is_high, 1 + clip_eps_high, ratio))
    return Clipped(bounded * advantage, is_low, is_high)


# --- from tokens to one number -------------------------------------------------------------------------------------

# (tokens of the sequence at each token, sequences, tokens, max_completion_tokens) -> weight; the counts are the
# minibatch's, never a microbatch's or a device's, so that partial sums add up to the whole.
AGGREGATIONS: dict[str, Callable] = {
    # The R1 report: a sequence is one term, its KL the sum over its tokens (the chain rule).
    "sequence": lambda length, sequences, tokens, limit: np.ones_like(length) / sequences,
    "per_sequence_token_mean": lambda length, sequences, tokens, limit: 1 / (length * sequences),  # DeepSeekMath
    "token_mean": lambda length, sequences, tokens, limit: np.ones_like(length) / tokens,  # DAPO, section 3.3
    # Dr. GRPO, 2503.20783, section 3.2
    "constant_length": lambda length, sequences, tokens, limit: np.ones_like(length) / (sequences * limit),
}


def token_weights(
    aggregation: str,
    lengths: Int[np.ndarray, "B T"],
    n_sequences: int,
    total_tokens: int,
    max_completion_tokens: int,
) -> Float[np.ndarray, "B T"]:
    """How much each token's term counts in the loss of a minibatch; the loss is sum(weights * terms).

    Computed by the host: each minibatch has a shape of its own, and on device each shape would be compiled.

    Args:
        aggregation: a key of AGGREGATIONS.
        lengths: at each completion token the number of completion tokens in its sequence, zero at every other token.
        n_sequences: sequences in the whole minibatch, over all its rows, microbatches and devices.
        total_tokens: completion tokens in the whole minibatch.
        max_completion_tokens: the budget, the divisor of "constant_length".
    """
    lengths = np.asarray(lengths, np.float32)
    sequences, tokens = max(n_sequences, 1), max(total_tokens, 1)
    weights = AGGREGATIONS[aggregation](np.maximum(lengths, 1), sequences, tokens, max_completion_tokens)
    return np.where(lengths > 0, weights, 0)


class LossInputs(NamedTuple):
    """Packed tokens of a microbatch. Outside `is_completion` every other field may hold anything, NaN included.

    logp carries the gradient. A strictly on-policy update may pass stop_gradient(logp) as old_logp.
    sequence numbers the sequences of each row from 0; all tokens of a sequence lie in one row.
    """

    logp: Float[Array, "B T"]
    old_logp: Float[Array, "B T"]
    ref_logp: Float[Array, "B T"] | None
    sampler_logp: Float[Array, "B T"]
    advantage: Float[Array, "B T"]
    weights: Float[Array, "B T"]
    is_completion: Bool[Array, "B T"]
    sequence: Int[Array, "B T"]


def _only_completions(inputs: LossInputs) -> LossInputs:
    # Before any arithmetic: a mask applied to the result alone would let 0 * NaN into the gradient.
    cleared = jax.tree.map(lambda value: jnp.where(inputs.is_completion, value, 0), inputs)
    return jax.lax.stop_gradient(cleared)._replace(logp=cleared.logp, is_completion=inputs.is_completion)


def loss(
    inputs: LossInputs, settings: GrpoConfig, row_sequences: int
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss of a microbatch: sum of weights * (KL term - objective) over its completion tokens.

    Args:
        inputs: the tokens; `weights` come from `token_weights` for the whole minibatch.
        settings: static.
        row_sequences: sequences that a row may hold, more than any number in `inputs.sequence`; static.

    Returns:
        The loss, and sums for `accumulate` and `finish_metrics`. Over the microbatches of a minibatch losses,
        gradients and sums add up to those of the whole.

    Raises:
        ValueError: a KL term is wanted and `ref_logp` is missing.
    """
    if settings.kl_coef and inputs.ref_logp is None:
        raise ValueError(f"grpo.kl_coef is {settings.kl_coef} but ref_logp is missing: score the reference, or set 0")
    is_completion = inputs.is_completion
    inputs = _only_completions(inputs)

    log_ratio = total = inputs.logp - inputs.old_logp
    sharing = jnp.ones_like(log_ratio)  # tokens that share one ratio
    if settings.ratio_level != "token":
        total = sequence_sums(log_ratio, inputs.sequence, row_sequences)
        sharing = jnp.maximum(sequence_sums(is_completion.astype(jnp.float32), inputs.sequence, row_sequences), 1)
    ratio = _ratio(RATIO_LEVELS[settings.ratio_level](log_ratio, total, sharing))
    clipped = clipped_objective(ratio, inputs.advantage, settings.clip_eps_low, settings.clip_eps_high)
    # This aggregation sums over the tokens of a sequence; what they share must still count once.
    objective = clipped.objective / sharing if settings.aggregation == "sequence" else clipped.objective

    mismatch = inputs.old_logp - inputs.sampler_logp
    sums = {
        "tokens": is_completion,
        "ratio": ratio,
        "clip_low": clipped.is_low,
        "clip_high": clipped.is_high,
        "mismatch_abs": jnp.abs(mismatch),
    }
    if settings.importance_cap is not None:
        # Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".
        importance = _ratio(mismatch)
        objective = jnp.minimum(importance, settings.importance_cap) * objective
        sums["truncated"] = importance > settings.importance_cap
    terms = -objective
    sums["policy_loss"] = inputs.weights * terms
    if inputs.ref_logp is not None:
        kl = KL_ESTIMATORS[settings.kl_estimator](inputs.logp, inputs.old_logp, inputs.ref_logp)
        sums["kl"] = kl
        if settings.kl_coef:
            terms = terms + settings.kl_coef * kl

    def total_of(values: Array) -> Array:
        return jnp.sum(jnp.where(is_completion, values, 0), dtype=jnp.float32)

    record = {name: total_of(values) for name, values in sums.items()}
    record["ratio_max"] = jnp.max(jnp.where(is_completion, ratio, 0))
    record["mismatch_max"] = jnp.max(jnp.abs(mismatch))
    return total_of(inputs.weights * terms), jax.lax.stop_gradient(record)


def accumulate(left: Mapping[str, Array], right: Mapping[str, Array]) -> dict[str, Array]:
    """The record of two microbatches together; zeros are neutral, so it may start a scan's carry."""
    return {name: (jnp.maximum if name.endswith("_max") else jnp.add)(left[name], right[name]) for name in left}


def finish_metrics(sums: Mapping[str, ArrayLike]) -> dict[str, Array]:
    """Standard names from accumulated sums: means over completion tokens, and maxima.

    kl/mean is there when a reference was given, importance/truncated_share when importance_cap is set.
    loss/policy is the minibatch's; over several minibatches it is their sum.
    """
    tokens = jnp.maximum(sums["tokens"], 1)
    means = {
        "kl/mean": "kl",
        "clip/low_share": "clip_low",
        "clip/high_share": "clip_high",
        "ratio/mean": "ratio",
        "mismatch/mean_abs": "mismatch_abs",
        "importance/truncated_share": "truncated",
    }
    metrics = {name: sums[key] / tokens for name, key in means.items() if key in sums}
    return metrics | {
        "loss/policy": sums["policy_loss"],
        "ratio/max": sums["ratio_max"],
        "mismatch/max": sums["mismatch_max"],
    }
