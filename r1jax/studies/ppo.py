"""PPO with a value model, what GRPO does without (Schulman et al. 2017, arXiv 1707.06347; R1 report, section 2.1).

A second model as large as the policy estimates what is still to come at every token; generalised advantage estimation
(arXiv 1506.02438) weighs its estimates against what came. The KL to the reference is a penalty in each token's reward,
as in InstructGPT (arXiv 2203.02155). Prompts, sampler, minibatches, clipping and weights of tokens are those of GRPO.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from r1jax import grpo, hosts, loops, minibatches, updates
from r1jax.reinforce import Programs, reinforce
from r1jax.rollout import Group
from r1jax.run import Config, Policy, Run, training_program, training_state
from r1jax.studies import values


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


def token_rewards(batch: updates.Batch, kl_coef: float) -> Float[Array, "M B T"]:
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
    batch: updates.Batch, predicted: Float[Array, "M B T"], kl_coef: float, settings: PpoConfig
) -> updates.Batch:
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


def clipped_square(clip: float, values: Array, micro: updates.Batch) -> Array:
    """Half the squared error, or that of a value kept within `clip` of the old one where it is larger."""
    near = micro["predicted"] + jnp.clip(values - micro["predicted"], -clip, clip)
    return 0.5 * jnp.maximum((values - micro["target"]) ** 2, (near - micro["target"]) ** 2)


def with_rewards(groups: Sequence[Group], settings: grpo.GrpoConfig, limit: int) -> list[list[minibatches.Trained]]:
    """As minibatches.with_advantages, but with each completion's own reward in place of an advantage."""
    items = minibatches.with_advantages(groups, settings, limit)
    return [[dataclasses.replace(i, advantage=i.sample.graded.reward) for i in group] for group in items]


def megabytes(state: updates.State) -> float:
    """Of the arrays of a training state."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state)) / 1e6


def with_value_model(config: Config, policy: Policy, run: Run) -> Callable[[Programs, loops.Moves], loops.Moves]:
    """What makes GRPO's moves those of PPO.

    Raises:
        ValueError: a setting that PPO has no place for.
    """
    settings, layout = PpoConfig(**config["ppo"]), run.layouts["train"]
    if config["grpo"]["overlong"] == "soft":
        raise ValueError("config.grpo.overlong is 'soft', which PPO does not read: take 'none' or 'mask'")
    if config["rl"]["dynamic_sampling"]:
        raise ValueError("config.rl.dynamic_sampling drops groups without a signal, which PPO does not need: set False")

    def adapt(made: Programs, moves: loops.Moves) -> loops.Moves:
        rate = dataclasses.replace(made.optimizing, learning_rate=settings.value_learning_rate)
        program = values.head_program(config, policy, layout)
        optimizer, value_state, value_like = values.with_head(policy, layout, rate)
        predict, kl_coef = updates.make_values(program), made.objective.kl_coef
        teach = updates.make_value_update(program, optimizer, partial(clipped_square, settings.value_clip))
        # The penalty stands in the reward.
        objective = dataclasses.replace(made.objective, kl_coef=0.0)
        acting = training_program(config, policy, layout, temperature=made.settings.temperature)
        improve = updates.make_rl_update(acting, objective, made.optimizer, made.shape.row_tokens + 1)
        complete = jax.jit(partial(estimates, kl_coef=kl_coef, settings=settings))

        def start(policy: Policy, layout: object, policy_optimizer: object) -> tuple[updates.State, updates.State]:
            state, like = training_state(policy, layout, policy_optimizer)
            hosts.say(
                f"{run.stage}: parameters and moments take {megabytes(state):.1f} MB of the policy and "
                f"{megabytes(value_state):.1f} MB of the value model"
            )
            return {**state, "value": value_state}, {**like, "value": value_like}

        def prepare(state: updates.State, batch: updates.Batch, n: int) -> updates.Batch:
            return complete(batch, predict(state["value"]["policy"], batch, n))

        def update(
            state: updates.State, batch: updates.Batch, n: int, is_on_policy: bool
        ) -> tuple[updates.State, dict[str, Array]]:
            value, learned = teach(state["value"], batch, n)
            acted, sums = improve({name: state[name] for name in ("policy", "optim")}, batch, n, is_on_policy)
            sums |= {"value_loss": learned["loss"], "value_explained": values.explained(learned)}
            return {**acted, "value": value}, sums

        return dataclasses.replace(moves, start=start, advantages=with_rewards, prepare=prepare, update=update)

    return adapt


def stage(run: Run, config: Config, policy: Policy) -> Policy:
    """Trains the policy by PPO; leaves a released-model folder in WORKDIR/models and WORKDIR/report.html."""
    return reinforce(run, config, policy, adapt=with_value_model(config, policy, run))
