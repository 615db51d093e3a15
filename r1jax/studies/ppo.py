"""PPO with a value model, what GRPO does without (Schulman et al. 2017, arXiv 1707.06347; R1 report, section 2.1).

A second model as large as the policy estimates what is still to come at every token; generalised advantage estimation
(gae.py) weighs its estimates against what came. The KL to the reference is a penalty in each token's reward, as in
InstructGPT (arXiv 2203.02155). Prompts, sampler, minibatches, clipping and weights of tokens are those of GRPO.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax

from r1jax import grpo, hosts, loops, minibatches, scorers, updates
from r1jax.reinforce import Programs, reinforce
from r1jax.rollout import Group
from r1jax.run import Config, Policy, Run, training_program, training_state
from r1jax.studies import values
from r1jax.studies.gae import PpoConfig, clipped_square, estimates


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
        program = scorers.head_program(config, policy, layout)
        optimizer, value_state, value_like = scorers.with_head(policy, layout, rate)
        predict, kl_coef = updates.make_values(program), made.objective.kl_coef
        teach = updates.make_value_update(program, optimizer, partial(clipped_square, settings.value_clip))
        # The penalty stands in the reward.
        objective = dataclasses.replace(made.objective, kl_coef=0.0)
        acting = training_program(config, policy, layout, temperature=made.settings.temperature)
        improve = updates.make_rl_update(acting, objective, made.optimizer, made.shape.row_tokens + 1)
        complete = jax.jit(partial(estimates, kl_coef=kl_coef, settings=settings))

        def start(*given: object) -> tuple[updates.State | None, updates.State]:
            state, like = training_state(*given)
            hosts.say(
                f"{run.stage}: parameters and moments take {megabytes(like):.1f} MB of the policy and "
                f"{megabytes(value_like):.1f} MB of the value model"
            )
            return state and {**state, "value": value_state}, {**like, "value": value_like}

        def prepare(state: updates.State, batch: updates.Batch, n: int) -> updates.Batch:
            return complete(batch, predict(state["value"]["policy"], batch, n))

        def update(
            state: updates.State, batch: updates.Batch, n: int, is_on_policy: bool
        ) -> tuple[updates.State, dict[str, jax.Array]]:
            value, learned = teach(state["value"], batch, n)
            acted, sums = improve({name: state[name] for name in ("policy", "optim")}, batch, n, is_on_policy)
            sums |= {"value_loss": learned["loss"], "value_explained": values.explained(learned)}
            return {**acted, "value": value}, sums

        return dataclasses.replace(
            moves, start=start, advantages=with_rewards, prepare=prepare, update=update, compile=None
        )

    return adapt


def stage(run: Run, config: Config, policy: Policy) -> Policy:
    """Trains the policy by PPO; leaves a released-model folder in WORKDIR/models and WORKDIR/report.html."""
    return reinforce(run, config, policy, adapt=with_value_model(config, policy, run))
