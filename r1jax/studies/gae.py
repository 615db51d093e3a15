"""Generalised advantage estimation (Schulman et al. 2015, arXiv 1506.02438) and PPO's value loss, as pure functions.

Arrays are packed rows: tokens of a completion stand side by side, and `sequence` tells neighbours apart.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class PpoConfig:
    """What PPO adds to config.grpo and config.optim; see configs/base.py."""

    gae_lambda: float
    discount: float
    value_clip: float
    value_learning_rate: float
    whiten: bool

    def __post_init__(self) -> None:
        for key in ("gae_lambda", "discount"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"config.ppo.{key} is {getattr(self, key)}, wanted between 0 and 1")
        if not self.value_clip > 0:
            raise ValueError(f"config.ppo.value_clip is {self.value_clip}, wanted above zero")


def is_followed(is_completion: Bool[Array, "*n T"], sequence: Int[Array, "*n T"]) -> Bool[Array, "*n T"]:
    """True at tokens of a completion that are not its last; those of one completion stand side by side in a row."""
    goes_on = is_completion[..., 1:] & (sequence[..., 1:] == sequence[..., :-1])
    return is_completion & jnp.pad(goes_on, [(0, 0)] * (is_completion.ndim - 1) + [(0, 1)])


def gae(
    rewards: Float[Array, "*n T"],
    values: Float[Array, "*n T"],
    is_completion: Bool[Array, "*n T"],
    sequence: Int[Array, "*n T"],
    discount: float,
    gae_lambda: float,
) -> Float[Array, "*n T"]:
    """Generalised advantages of packed tokens (arXiv 1506.02438, equation 16); zero outside completions.

    A_t = sum over l of (discount * gae_lambda)^l * (r_{t+l} + discount * V_{t+l+1} - V_{t+l}), to the completion's end,
    after which everything is worth zero.

    Args:
        rewards: of each token.
        values: what is expected from each token on, before it is drawn.
    """
    goes_on = is_followed(is_completion, sequence)
    following = jnp.where(goes_on, jnp.roll(values, -1, axis=-1), 0.0)
    surprise = jnp.where(is_completion, rewards + discount * following - values, 0.0)
    decay = jnp.where(goes_on, discount * gae_lambda, 0.0)

    def back(later: Array, here: tuple[Array, Array]) -> tuple[Array, Array]:
        advantage = here[0] + here[1] * later
        return advantage, advantage

    last_first = jnp.moveaxis(surprise, -1, 0), jnp.moveaxis(decay, -1, 0)
    _, out = jax.lax.scan(back, jnp.zeros(values.shape[:-1]), last_first, reverse=True)
    return jnp.moveaxis(out, 0, -1)


def token_rewards(batch: dict[str, Array], kl_coef: float) -> Float[Array, "M B T"]:
    """The completion's reward, which lies in `advantage`, at its last token; at each the penalty for leaving."""
    is_last = batch["is_completion"] & ~is_followed(batch["is_completion"], batch["sequence"])
    rewards = jnp.where(is_last, batch["advantage"], 0.0)
    if kl_coef:
        # Of the policy that sampled: these are its tokens.
        rewards = rewards - kl_coef * (batch["sampler_logp"] - batch["ref_logp"])
    return rewards


def whitened(x: Float[Array, "M B T"], is_completion: Bool[Array, "M B T"]) -> Float[Array, "M B T"]:
    """Mean 0 and deviation 1 over the completion tokens of a minibatch."""
    n = jnp.maximum(is_completion.sum(), 1)
    centred = jnp.where(is_completion, x - jnp.where(is_completion, x, 0.0).sum() / n, 0.0)
    return centred / (jnp.sqrt((centred**2).sum() / n) + 1e-6)


def estimates(
    batch: dict[str, Array], predicted: Float[Array, "M B T"], kl_coef: float, settings: PpoConfig
) -> dict[str, Array]:
    """What PPO adds to a minibatch: per-token advantages, and what the value model learns from.

    Args:
        predicted: the value model's, before the updates of this rollout.
    """
    is_completion = batch["is_completion"]
    predicted = jnp.where(is_completion, predicted, 0.0)
    rewards = token_rewards(batch, kl_coef)
    advantage = gae(rewards, predicted, is_completion, batch["sequence"], settings.discount, settings.gae_lambda)
    return {
        **batch,
        "target": advantage + predicted,
        "predicted": predicted,
        "is_valued": is_completion,
        "advantage": whitened(advantage, is_completion) if settings.whiten else advantage,
    }


def clipped_square(clip: float, values: Array, micro: dict[str, Array]) -> Array:
    """Half the squared error, or that of a value kept within `clip` of the old one where it is larger."""
    near = micro["predicted"] + jnp.clip(values - micro["predicted"], -clip, clip)
    return 0.5 * jnp.maximum((values - micro["target"]) ** 2, (near - micro["target"]) ** 2)
