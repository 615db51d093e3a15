"""RL for all scenarios (R1 report, section 2.3.4): reasoning by rule, general instructions by reward models: R1.

Temperature 0.7; general instructions and preference join only in the last part, since they can be hacked. An alarm
watches for that on validation data: the reward models' score rises while the accuracy that rules measure falls.
"""

import functools
import pathlib
from collections.abc import Callable

from absl import logging
from ml_collections import ConfigDict

from r1jax import data, evaluate, held_out, hosts, preference, scorers
from r1jax.reinforce import General, reinforce
from r1jax.rewards.pool import RewardPool
from r1jax.run import Policy, Run, model_folder, open_source
from r1jax.slots import Verbs
from r1jax.types import Params

ALARM_ACTIONS = ("warn", "stop_preference", "stop_run")


def watched(config: ConfigDict) -> ConfigDict:
    """The config by which held_out prepares what the alarm looks at: problems and general prompts to validate with.

    Raises:
        ValueError: they would be those of the training.
    """
    c, own = config.preference, config.copy_and_resolve_references()
    own.data.eval_source = data.apart(c.valid_problems, config.data.source, "config.preference.valid_problems")
    own.data.eval_split = c.valid_split
    own.eval.general = data.apart(c.valid_source, c.source, "config.preference.valid_source")
    own.eval.update({"samples": c.valid_samples, "decontaminate": ()})
    return own


def judges_at(workdir: pathlib.Path, name: str) -> pathlib.Path:
    """Where the reward models lie that config.preference.models names: a stage, or a folder of this machine."""
    left = model_folder(workdir, name)
    return left if left.exists() else pathlib.Path(name)


def check(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Raises ValueError where no reward models are there or to come, or the alarm could not watch."""
    c = config.preference
    if c.alarm_action not in ALARM_ACTIONS:
        raise ValueError(f"config.preference.alarm_action is {c.alarm_action!r}, wanted {', '.join(ALARM_ACTIONS)}")
    if config.rl.dynamic_sampling:
        raise ValueError("config.rl.dynamic_sampling cannot be used with config.preference: prompts join at an update")
    for key in ("problems", "every"):
        if config.eval[key] <= 0:
            raise ValueError(
                f"config.eval.{key} is {config.eval[key]}: the alarm for reward hacking would have nothing to look at"
            )
    watched(config)
    folder = judges_at(workdir, c.models)
    for name in ("helpful", "safe"):
        if c.models not in config.stages and not (folder / name / scorers.HEAD).exists():
            raise ValueError(
                f"config.preference.models is {c.models!r}, and {folder / name} holds no reward model: name a stage "
                f"before this one, one that left them in {workdir / 'models'}, or a folder with helpful and safe"
            )


def stage(run: Run, config: ConfigDict, policy: Policy) -> Policy:
    """Trains the policy by GRPO; leaves a released-model folder in WORKDIR/models and WORKDIR/report.html.

    Raises:
        ValueError: a reward model is of another vocabulary, or the alarm stops the run.
    """
    c, updates = config.preference, config.rl.updates
    to_watch = watched(config)
    folder = judges_at(run.workdir, c.models)
    judges = {name: scorers.load(run, config, folder / name, policy) for name in ("helpful", "safe")}
    judge = functools.partial(preference.with_preference, scorers=judges, weight=c.weight)
    general = data.PromptStream(open_source(config, c.source, c.split, is_general=True), run.seed)

    def seen(step: int) -> list[dict]:
        """What the alarm has looked at in this stage up to a step: what a run that goes on from there knew as well."""
        return [one for one in run.summary.validation if one["stage"] == run.stage and one["step"] <= step]

    def is_trusted(position: int) -> bool:
        known = seen(position // config.rl.prompts_per_update)
        alarms = (preference.is_hacked(known[: n + 1], c.alarm_drop) for n in range(len(known)))
        return c.alarm_action != "stop_preference" or not any(alarms)

    def watch(pool: RewardPool, verbs: Verbs) -> Callable[[Params, int, int], None]:
        problems = held_out.prepare(run, to_watch, policy, pool, verbs)

        def look(weights: Params, step: int, limit: int) -> None:
            if step not in (one["step"] for one in seen(updates)):
                record = evaluate.measure(problems.sample(weights, limit), run.stage, step)
                record |= evaluate.preference(judge(problems.general.sample(weights, limit)))
                run.summary.add(record, run.summary.validation)
                hosts.say(
                    f"validation at step {step}: pass@1 {record['pass_at_1']:.1%}, "
                    f"reward models' score {record['preference']:.3f}"
                )
            alarm(seen(updates))

        return look

    def alarm(known: list[dict]) -> None:
        if not preference.is_hacked(known, c.alarm_drop):
            return
        last = known[-1]
        text = (
            f"{run.stage}, step {last['step']}: the reward models' score rose to {last['preference']:.3f} while pass@1 "
            f"on validation problems fell to {last['pass_at_1']:.1%}: reward hacking"
        )
        if c.alarm_action == "stop_run":
            raise ValueError(f"{text}; lower config.preference.weight, or see config.preference.alarm_action")
        logging.warning("%s (config.preference.alarm_action is %s)", text, c.alarm_action)

    mix = functools.partial(
        data.Mixture,
        general=general,
        first=c.from_update * config.rl.prompts_per_update,
        share=c.share,
        is_on=is_trusted,
    )
    return reinforce(run, config, policy, General(mix, judge, watch))
