"""Held-out problems and how a policy is measured on them: sampled, graded, written out, during training or alone.

General instructions have no right answer: beside the problems, they are measured by a rule that training never sees.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from r1jax import data, draw, evaluate, hosts, metrics, overlap
from r1jax.rewards.pool import RewardPool
from r1jax.rollout import Group, collect, encode_prompts, records
from r1jax.run import (
    EVALUATION,
    Config,
    Policy,
    Run,
    Stopped,
    check_lengths,
    decode_layout,
    make_verbs,
    open_pool,
    open_source,
)
from r1jax.sampler import Interrupted
from r1jax.slots import Verbs
from r1jax.types import Example, Params


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Problems, and what it takes to sample and grade them."""

    run: Run
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
    opening: str = ""  # what every completion is made to begin with
    how: dict[str, Any] = dataclasses.field(default_factory=dict)  # what it is measured with, for the record
    found: dict[str, Any] = dataclasses.field(default_factory=dict)  # about the problems, for the record
    general: "HeldOut | None" = None
    judge: Callable[[list[Group]], list[Group]] | None = None  # adds reward models' scores to general instructions

    def measure(self, weights: Params, step: int, limit: int) -> None:
        """Adds the record of these weights (decode layout) to summary.json, once per stage and step, and says it.

        A record that was measured with something else, by `how`, is replaced.

        Args:
            limit: of completion tokens, where there is none of evaluation's own.

        Raises:
            sampler.Interrupted: the run was asked to stop.
        """
        how = {**self.how, "max_completion_tokens": self.max_completion_tokens or limit}
        if not self.examples or self.run.summary.has({"stage": self.run.stage, "step": step, **how}):
            return
        tokenizer, groups = self.policy.tokenizer, self.sample(weights, limit)
        # The same prompts each time, so that the report can lay a problem's completions side by side.
        rows = records(groups[: self.written_groups], tokenizer, f"{self.run.stage} evaluation", step, step)
        metrics.write_rollout(self.run.workdir, f"{self.run.stage}-evaluation", step, rows)
        record = evaluate.measure(groups, self.run.stage, step) | how | self.found
        if self.general is not None:
            general = self.general.sample(weights, limit)
            record |= evaluate.measure_general(self.judge(general) if self.judge else general)
        self.run.summary.add(record)
        low, high = record["pass_at_1_ci"]
        more = {"language_consistency": "in the question's language", "general_worth": "worth of letters"}
        hosts.say(
            f"evaluation at step {step}: pass@1 {record['pass_at_1']:.1%} [{low:.1%}, {high:.1%}], "
            f"cons@{record['k']} {record['cons_at_k']:.1%}, {record['mean_completion_tokens']:.1f} tokens, "
            f"{record['reflective_per_completion']:.2f} reflective words"
            + "".join(f", {record[name]:.1%} {what}" for name, what in more.items() if name in record)
            + f" ({record['n_problems']} problems)"
        )

    def sample(self, weights: Params, limit: int) -> list[Group]:
        """The graded completions of all problems."""
        return collect(
            self.verbs, weights, self.policy.tokenizer, self.pool, self.examples, self.template, self.samples,
            jax.random.fold_in(jax.random.key(self.run.seed), EVALUATION), 0, self.max_prompt_tokens,
            self.max_completion_tokens or limit, self.stop_texts, self.run.is_interrupted,
            self.opening,
        )  # fmt: skip


def prepare(
    run: Run,
    config: Config,
    policy: Policy,
    pool: RewardPool,
    training: Verbs | None = None,
    judge: Callable[[list[Group]], list[Group]] | None = None,
    trained_on: Sequence[Example] = (),
) -> HeldOut:
    """What config.eval and config.data ask for.

    Args:
        training: sampling functions to use where tokens are drawn alike.
        judge: see `HeldOut`.
        trained_on: prompts of the training; held-out problems that are among them are named and counted.

    Raises:
        ValueError: no such source or split, or a prompt that is too long; names the key.
    """
    prompts, settings = config["data"], config["eval"]
    opening = settings["opening"]

    def examples(source: str, is_general: bool = False) -> list[Example]:
        found = open_source(config, source, prompts["eval_split"], is_general)
        taken = data.PromptStream(found, 0).take(0, min(most, len(found.examples)))
        # Now rather than when its turn comes: a prompt that is too long.
        encode_prompts(taken, prompts["template"], policy.tokenizer, prompts["max_prompt_tokens"], opening)
        return taken

    most = settings["problems"]
    drawing = draw.DrawConfig(**{key: settings[key] for key in ("temperature", "top_k", "top_p")})
    if training is None or training.drawing != drawing:
        training = make_verbs(config, policy, run.layouts["decode"], drawing)
    source = prompts["eval_source"] or prompts["source"]
    taken = examples(source) if most else []
    how = {"source": source, "split": prompts["eval_split"], "rewards": sorted(config["rewards"])}
    problems = HeldOut(
        run=run,
        judge=judge,
        policy=policy,
        examples=taken,
        opening=opening,
        how=how | measured_with(run, config, taken, settings["samples"]),
        found=leaks(taken, trained_on, settings["decontaminate"], prompts["split"]),
        verbs=training,
        pool=pool,
        samples=settings["samples"],
        max_completion_tokens=settings["max_completion_tokens"],
        template=prompts["template"],
        max_prompt_tokens=prompts["max_prompt_tokens"],
        stop_texts=tuple(config["rl"]["stop_texts"]),
        written_groups=config["log"]["rollout_groups"],
    )
    if not settings["general"]:
        return problems
    general = examples(settings["general"], is_general=True)
    how = {"general": settings["general"], "general_digest": digest(general), "general_k": settings["general_samples"]}
    return dataclasses.replace(
        problems,
        how=problems.how | how,
        general=dataclasses.replace(problems, examples=general, samples=settings["general_samples"]),
    )


def digest(examples: Sequence[Example]) -> str:
    """What tells these problems and their order from any others, in 16 hexadecimal digits."""
    told = [[str(one.get(key)) for key in ("id", "question", "answer")] for one in examples]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def measured_with(run: Run, config: Config, examples: Sequence[Example], samples: int) -> dict[str, Any]:
    """What a record says of how it was measured, but for the source of its problems and the longest completion.

    As JSON gives it back, so that a record that was read can be compared.
    """
    settings = config["eval"]
    return {
        "model": config["model"]["path"],
        "problems_digest": digest(examples),
        "k": samples,
        "seed": run.seed,
        **{key: settings[key] for key in ("temperature", "top_p", "top_k", "opening")},
        "template": config["data"]["template"],
        "marked_answers": config["grading"]["marked_answers"],
        "decontaminate": list(settings["decontaminate"]),
    }


def leaks(
    examples: Sequence[Example], trained_on: Sequence[Example], against: Sequence[str], split: str
) -> dict[str, Any]:
    """What the record says of problems that were trained on; what is found is said at once.

    Args:
        against: training data whose 10-grams are looked for (config.eval.decontaminate).
        split: of those that are sources.
    """
    found: dict[str, Any] = {}
    questions = {one["question"].strip() for one in trained_on}
    if same := [one["id"] for one in examples if overlap.asked(one).strip() in questions]:
        found["trained_on"] = {"problems": len(same), "share": len(same) / len(examples), "ids": same}
        hosts.say(
            f"warning: {len(same)} of {len(examples)} held-out problems are among the training prompts "
            f"({named(same)}); measure on others (config.data.eval_source)"
        )
    if against and examples:
        found["decontamination"] = report = overlap.report(examples, against, split)
        hosts.say(
            f"{report['overlapping']} of {len(examples)} problems ({report['share']:.1%}) share {report['n']} words in "
            f"a row with {', '.join(against)}" + (f": {named(report['ids'])}" if report["ids"] else "")
        )
    return found


def named(ids: Sequence[str], most: int = 5) -> str:
    """The first of some ids, and how many more there are."""
    return ", ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")


@contextlib.contextmanager
def measuring(
    run: Run, config: Config, policy: Policy, trained_on: Sequence[Example] = ()
) -> Iterator[Callable[[Params, int], None]]:
    """Opens what config.eval asks for; yields what measures a policy of this kind, given its parameters, at a step.

    It raises run.Stopped when SIGTERM came.

    Args:
        trained_on: see `prepare`.

    Raises:
        ValueError: as `prepare`, and lengths that do not fit into the policy's context.
    """
    if not config["eval"]["problems"]:
        yield lambda params, step: None
        return
    limit = config["eval"]["max_completion_tokens"] or config["rl"]["max_completion_tokens"]
    check_lengths(policy, config["data"]["max_prompt_tokens"], limit)
    weights = decode_layout(policy, run.layouts["decode"], config["model"]["compute_dtype"])
    with open_pool(config) as pool:
        problems = prepare(run, config, policy, pool, trained_on=trained_on)

        def measure(params: Params, step: int) -> None:
            try:
                problems.measure(weights(params), step, limit)
            except Interrupted as stopped:
                raise Stopped from stopped

        yield measure


def evaluate_policy(run: Run, config: Config, policy: Policy, step: int) -> None:
    """Measures a policy once, as config.eval asks for it; see `measuring`."""
    with measuring(run, config, policy) as measure:
        measure(policy.params, step)
