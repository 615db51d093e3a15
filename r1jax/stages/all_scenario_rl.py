"""RL for all scenarios (R1 report, section 2.3.4): reasoning by rule, general instructions by reward models: R1.

Temperature 0.7; general instructions and preference join only in the last part, since they can be hacked. An alarm
watches for that: the reward models' score rises while the accuracy that rules measure falls.
"""

import functools

from absl import logging
from ml_collections import ConfigDict

from r1jax import data, preference, scorers
from r1jax.reinforce import General, reinforce
from r1jax.run import Policy, Run, model_folder, open_source

ALARM_ACTIONS = ("warn", "stop_preference", "stop_run")


def stage(run: Run, config: ConfigDict, policy: Policy) -> Policy:
    """Trains the policy by GRPO; leaves a released-model folder in WORKDIR/models and WORKDIR/report.html.

    Raises:
        ValueError: there are no reward models, or the alarm stops the run.
    """
    c = config.preference
    if c.alarm_action not in ALARM_ACTIONS:
        raise ValueError(f"config.preference.alarm_action is {c.alarm_action!r}, wanted {', '.join(ALARM_ACTIONS)}")
    if config.rl.dynamic_sampling:
        raise ValueError("config.rl.dynamic_sampling cannot be used with config.preference: prompts join at an update")
    folder = model_folder(run.workdir, c.models)
    judges = {name: scorers.load(run, config, folder / name, policy) for name in ("helpful", "safe")}
    general = data.PromptStream(open_source(config, c.source, c.split), run.seed)

    def evaluations(step: int) -> list[dict]:
        """Those of this stage up to a step: what a run that goes on from there knew as well."""
        return [one for one in run.summary.evals if one["stage"] == run.stage and one["step"] <= step]

    def is_trusted(position: int) -> bool:
        step = position // config.rl.prompts_per_update
        seen = evaluations(step)
        alarms = (preference.is_hacked(seen[: n + 1], c.alarm_drop) for n in range(len(seen)))
        return c.alarm_action != "stop_preference" or not any(alarms)

    def check() -> None:
        seen = evaluations(config.rl.updates)
        if not preference.is_hacked(seen, c.alarm_drop):
            return
        last = seen[-1]
        text = (
            f"{run.stage}, step {last['step']}: the reward models' score rose to {last['preference']:.3f} while pass@1 "
            f"fell to {last['pass_at_1']:.1%}: reward hacking"
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
    judge = functools.partial(preference.with_preference, scorers=judges, weight=c.weight)
    return reinforce(run, config, policy, General(mix, judge, check))
