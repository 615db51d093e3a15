"""How one token is drawn: temperature, top-k, top-p, and whose random number decides.

Draws derive from (run key, rollout, prompt, member, position) alone, so that slots, batch and mesh do not matter. A
token is drawn by inverting the cumulative distribution: one random number a token, not one per vocabulary entry.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32


@dataclasses.dataclass(frozen=True)
class DrawConfig:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep the whole vocabulary."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}, wanted zero (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}, wanted zero (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, wanted above 0 and at most 1")


def sample_keys(rollout_key: Array, prompts: Int[Array, "n"], members: Int[Array, "n"]) -> UInt32[Array, "n 2"]:
    """Key data of each (prompt, member) of a rollout."""
    fold = jax.vmap(lambda prompt, member: jax.random.fold_in(jax.random.fold_in(rollout_key, prompt), member))
    return jax.random.key_data(fold(prompts, members))


def uniforms(keys: UInt32[Array, "B 2"], places: Int[Array, "B"]) -> Float[Array, "B"]:
    """One number in [0, 1) for each slot, for the token at that place of its completion."""
    one = jax.vmap(lambda key, place: jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key), place)))
    return one(keys, places)


def kept(z: Float[Array, "B V"], config: DrawConfig) -> Bool[Array, "B V"]:
    """True for tokens that top-k and top-p leave; the likeliest token always stays."""
    ranked = jnp.flip(jnp.sort(z, axis=-1), -1)
    threshold = jnp.full(z.shape[:1], -jnp.inf)
    if config.top_k:
        threshold = ranked[:, min(config.top_k, z.shape[-1]) - 1]
    if config.top_p < 1:
        # As in nucleus sampling after top-k: the mass is that of what top-k left.
        mass = jax.nn.softmax(jnp.where(ranked >= threshold[:, None], ranked, -jnp.inf), axis=-1)
        before = jnp.cumsum(mass, axis=-1) - mass
        last = jnp.sum(before < config.top_p, axis=-1) - 1
        threshold = jnp.maximum(threshold, jnp.take_along_axis(ranked, last[:, None], axis=-1)[:, 0])
    return z >= threshold[:, None]


def draw(
    logits: Float[Array, "B V"], u: Float[Array, "B"], config: DrawConfig
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Token and its log-probability under the tempered distribution (before top-k and top-p; greedy: untempered)."""
    z = logits / (config.temperature or 1.0)
    logp = jax.nn.log_softmax(z, axis=-1)
    if config.temperature == 0:
        token = jnp.argmax(z, axis=-1)
    else:
        p = jnp.exp(logp)
        if config.top_k or config.top_p < 1:
            p = jnp.where(kept(z, config), p, 0.0)
        total = jnp.cumsum(p, axis=-1)
        # A parallel sum rounds each entry in another order and may so step at tokens of zero probability: they are left
        # out. u is below one, so the largest sum always exceeds u times itself.
        total = jnp.where(p > 0, total, 0.0)
        is_reached = total > (u * total.max(axis=-1))[:, None]
        token = jnp.where(is_reached, jnp.arange(z.shape[-1]), z.shape[-1]).min(axis=-1)
    return token.astype(jnp.int32), jnp.take_along_axis(logp, token[:, None], axis=-1)[:, 0]
