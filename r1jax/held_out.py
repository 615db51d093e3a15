"""Held-out problems and how a policy is measured on them: sampled, graded, written out, during training or alone."""

import dataclasses

import jax

from r1jax import data, draw, evaluate, hosts, metrics
from r1jax.rewards.pool import RewardPool
from r1jax.rollout import collect, encode_prompts, records
from r1jax.run import EVALUATION, Config, Policy, Run, make_verbs, open_source
from r1jax.slots import Verbs
from r1jax.types import Example, Params


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Problems, and what it takes to sample and grade them."""

    run: Run
    stage: str
    policy: Policy
    examples: list[Example]
    verbs: Verbs
    pool: RewardPool
    samples: int  # per problem
    max_completion_tokens: int  # 0: as the caller says
    template: str
    max_prompt_tokens: int
    stop_texts: tuple[str, ...]
    written_groups: int  # whose completions are written out in full

    def measure(self, weights: Params, step: int, limit: int) -> None:
        """Adds the record of these weights (decode layout) to summary.json, once per stage and step, and says it.

        Args:
            limit: of completion tokens, where there is none of evaluation's own.

        Raises:
            rollout.Interrupted: the run was asked to stop.
        """
        done = {(record["stage"], record["step"]) for record in self.run.summary.evals}
        if not self.examples or (self.stage, step) in done:
            return
        tokenizer = self.policy.tokenizer
        groups = collect(
            self.verbs, weights, tokenizer, self.pool, self.examples, self.template, self.samples,
            jax.random.fold_in(jax.random.key(self.run.seed), EVALUATION), 0, self.max_prompt_tokens,
            self.max_completion_tokens or limit, self.stop_texts, self.run.is_interrupted,
        )  # fmt: skip
        # The same prompts each time, so that the report can lay a problem's completions side by side.
        rows = records(groups[: self.written_groups], tokenizer, f"{self.stage} evaluation", step, step)
        metrics.write_rollout(self.run.workdir, f"{self.stage}-evaluation", step, rows)
        record = evaluate.measure(groups, self.stage, step)
        self.run.summary.add(record)
        low, high = record["pass_at_1_ci"]
        hosts.say(
            f"evaluation at step {step}: pass@1 {record['pass_at_1']:.1%} [{low:.1%}, {high:.1%}], "
            f"cons@{record['k']} {record['cons_at_k']:.1%}, {record['mean_completion_tokens']:.1f} tokens, "
            f"{record['reflective_per_completion']:.2f} reflective words ({record['n_problems']} problems)"
        )


def prepare(
    run: Run, stage: str, config: Config, policy: Policy, pool: RewardPool, training: Verbs | None = None
) -> HeldOut:
    """What config.eval and config.data ask for; `training` are sampling functions to use where tokens are drawn alike.

    Raises:
        ValueError: no such source or split, or a prompt that is too long; names the key.
    """
    prompts, settings = config["data"], config["eval"]
    examples: list[Example] = []
    if settings["problems"]:
        source = open_source(config, prompts["eval_source"] or prompts["source"], prompts["eval_split"])
        examples = data.PromptStream(source, 0).take(0, min(settings["problems"], len(source.examples)))
        # Now rather than when its turn comes: a prompt that is too long.
        encode_prompts(examples, prompts["template"], policy.tokenizer, prompts["max_prompt_tokens"])
    drawing = draw.DrawConfig(**{key: settings[key] for key in ("temperature", "top_k", "top_p")})
    alike = training is not None and training.drawing == drawing
    return HeldOut(
        run=run,
        stage=stage,
        policy=policy,
        examples=examples,
        verbs=training if alike else make_verbs(config, policy, run.layouts["decode"], drawing),
        pool=pool,
        samples=settings["samples"],
        max_completion_tokens=settings["max_completion_tokens"],
        template=prompts["template"],
        max_prompt_tokens=prompts["max_prompt_tokens"],
        stop_texts=tuple(config["rl"]["stop_texts"]),
        written_groups=config["log"]["rollout_groups"],
    )
