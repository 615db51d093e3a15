"""Benchmarks measured: sampled, graded, open-ended ones judged, one record each in summary.json and a table in the log.

As in the R1 report, section 3: pass@1 over several samples at temperature 0.6 and top-p 0.95; judges see the summary
only, not the thought, so that length earns nothing.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from r1jax import benchmarks, data, draw, evaluate, held_out, hosts, metrics
from r1jax.benchmarks import Named
from r1jax.preference import Judge, judged_gap, open_judge
from r1jax.rewards.table import check_examples
from r1jax.rewards.worth import reply_of
from r1jax.rollout import Group, Sample, as_array, encode_prompts, records
from r1jax.run import Config, Policy, Run, Stopped, check_lengths, decode_layout, make_verbs, open_pool
from r1jax.sampler import Interrupted
from r1jax.slots import Verbs
from r1jax.types import Example

WIN = "win"  # the reward of a judged sample: 1.0 better than the baseline's reply, 0.5 as good


def load(run: Run, config: Config, policy: Policy, named: Named) -> list[Example]:
    """The problems of a benchmark, as many as config.eval.benchmark_problems asks for, their golds checked.

    Raises:
        ValueError: see `benchmarks.read`; a prompt that is too long.
    """
    examples, prompts, settings = benchmarks.read(named), config["data"], config["eval"]
    check_examples(examples, ["accuracy"])
    most = settings["benchmark_problems"] or len(examples)
    source = data.Source(named.name, tuple(examples))
    taken = data.PromptStream(source, 0).take(0, min(most, len(examples)))
    encode_prompts(taken, prompts["template"], policy.tokenizer, prompts["max_prompt_tokens"], settings["opening"])
    return taken


def judged(groups: Sequence[Group], judge: Judge, times: int, may_fail: float) -> tuple[list[Group], int]:
    """The groups with the reward WIN against the baseline's reply, without problems that the judge failed on.

    Args:
        times: judgements of each sample, in random order.
        may_fail: share of problems; above it nothing is worth going on with.

    Returns:
        What is left, and how many problems were dropped.

    Raises:
        ValueError: the judge failed too often.
    """
    kept: list[Group] = []
    for done, group in enumerate(groups):
        example = group[0].example
        rng = random.Random(f"order {example['id']}")
        question = {**example, "question": example["asked"]}
        gaps = [judged_gap(judge, question, reply_of(s.text), example["answer"], times, rng) for s in group]
        if None not in gaps:
            kept.append([_won(s, gap) for s, gap in zip(group, gaps, strict=True)])
        failed = done + 1 - len(kept)
        if failed > may_fail * len(groups):
            raise ValueError(
                f"the judge failed on {failed} of {done + 1} problems; see config.eval.judge and "
                "config.curate.editor_may_fail"
            )
    return kept, len(groups) - len(kept)


def _won(s: Sample, gap: float) -> Sample:
    rewards = {WIN: 1.0 if gap > 0 else 0.5 if gap == 0 else 0.0}
    return dataclasses.replace(s, graded=dataclasses.replace(s.graded, rewards=rewards, reward=rewards[WIN]))


def record_of(groups: Sequence[Group], named: Named, stage: str, step: int, found: dict[str, Any]) -> dict[str, Any]:
    """What summary.json keeps of a benchmark: evaluate.measure's record, and the score by its own metric."""
    record = evaluate.measure(groups, stage, step) | {"benchmark": named.name, "source": named.source, **found}
    metric = WIN if WIN in groups[0][0].graded.rewards else named.kind.rewards[0]
    scores = as_array(groups, lambda s: s.graded.rewards[metric]).mean(1)
    low, high = evaluate.interval(scores)
    record |= {"metric": metric, "score": float(scores.mean()), "score_ci": [float(low), float(high)]}
    if not named.kind.has_votes:
        for key in ("cons_at_k", "cons_at"):
            del record[key]
    if overlapping := set((found.get("decontamination") or {}).get("ids", ())):
        is_clean = [group[0].example["id"] not in overlapping for group in groups]
        record["score_clean"] = float(scores[is_clean].mean()) if any(is_clean) else None
    return record


def open_benchmarks(
    run: Run, config: Config, policy: Policy, trained_on: Sequence[Example] = ()
) -> Callable[[Policy, int], None]:
    """Reads the benchmarks of config.eval.benchmarks; what is returned measures a policy of this kind at a step.

    It leaves out those that have such a record of this stage and step; it raises run.Stopped when SIGTERM came, and
    records that are there stay.

    Args:
        trained_on: see `held_out.prepare`.

    Raises:
        ValueError: an unknown benchmark, a file with other columns, an open-ended one without a judge.
    """
    settings, prompts = config["eval"], config["data"]
    if not settings["benchmarks"]:
        return lambda policy, step: None
    asked = [benchmarks.parse(entry) for entry in settings["benchmarks"]]
    if len(names := [one.name for one in asked]) > len(set(names)):
        raise ValueError(f"config.eval.benchmarks names one twice: {', '.join(names)}")
    loaded = {one.name: load(run, config, policy, one) for one in asked}
    judge = _judge(config, asked)
    limit = settings["max_completion_tokens"] or config["rl"]["max_completion_tokens"]
    check_lengths(policy, prompts["max_prompt_tokens"], limit)
    drawing = draw.DrawConfig(**{key: settings[key] for key in ("temperature", "top_k", "top_p")})
    verbs = make_verbs(config, policy, run.layouts["decode"], drawing)
    known = {one.name: (one, loaded[one.name]) for one in asked}
    return partial(_evaluate, run, config, verbs, judge, limit, known, trained_on)


def evaluate_benchmarks(run: Run, config: Config, policy: Policy) -> None:
    """Measures a policy as it is on config.eval.benchmarks; see `open_benchmarks`, whose errors come first."""
    open_benchmarks(run, config, policy)(policy, 0)


def _evaluate(
    run: Run,
    config: Config,
    verbs: Verbs,
    judge: Judge | None,
    limit: int,
    asked: dict[str, tuple[Named, list[Example]]],
    trained_on: Sequence[Example],
    policy: Policy,
    step: int,
) -> None:
    settings, prompts = config["eval"], config["data"]
    weights = decode_layout(policy, run.layouts["decode"], config["model"]["compute_dtype"])(policy.params)
    for one, examples in asked.values():
        samples = settings["benchmark_samples"] or one.kind.samples
        how = {"source": one.source, **held_out.measured_with(run, config, examples, samples)}
        how |= {"max_completion_tokens": limit, "judge": settings["judge"] if one.kind.grader == "judged" else ""}
        if run.summary.has({"stage": run.stage, "step": step, "benchmark": one.name, **how}):
            continue
        hosts.say(f"{one.name}: {len(examples)} problems of {one.source}")
        leaks = held_out.leaks(examples, trained_on, settings["decontaminate"], prompts["split"])
        found: dict[str, Any] = {"decontamination": None, **leaks}
        with open_pool(config, dict.fromkeys(one.kind.rewards, 1.0)) as pool:
            problems = held_out.HeldOut(
                run=run,
                policy=policy,
                examples=examples,
                verbs=verbs,
                pool=pool,
                samples=samples,
                max_completion_tokens=limit,
                template=prompts["template"],
                max_prompt_tokens=prompts["max_prompt_tokens"],
                stop_texts=tuple(config["rl"]["stop_texts"]),
                written_groups=config["log"]["rollout_groups"],
                opening=settings["opening"],
            )
            try:
                groups = problems.sample(weights, limit)
            except Interrupted as stopped:
                raise Stopped from stopped
        if one.kind.grader == "judged":
            groups, found["judge_dropped"] = _judged(groups, judge, config)
        label = f"{run.stage} {one.name}"
        rows = records(groups[: problems.written_groups], policy.tokenizer, label, step, step)
        metrics.write_rollout(run.workdir, label.replace(" ", "-"), step, rows)
        run.summary.add(record_of(groups, one, run.stage, step, how | found))
    here = [r for r in run.summary.evals if (r["stage"], r["step"]) == (run.stage, step)]
    hosts.say(table([r for r in here if r.get("benchmark") in asked]))


def _judge(config: Config, asked: Sequence[Named]) -> Judge | None:
    open_ended = [one.name for one in asked if one.kind.grader == "judged"]
    if not open_ended:
        return None
    if not (name := config["eval"]["judge"]):
        raise ValueError(
            f"config.eval.judge is empty, but {open_ended[0]} has to be judged: module:function or a server"
        )
    limits = config["curate"]
    return open_judge(name, limits["editor_timeout_s"], limits["editor_tries"], "config.eval.judge")


def _judged(groups: list[Group], judge: Judge, config: Config) -> tuple[list[Group], int]:
    """As `judged`; one host asks for all, since a judge may have told each something else."""
    wins: dict[str, list[float]] = {}
    if hosts.is_writer():
        kept, _ = judged(groups, judge, config["preference"]["judgements"], config["curate"]["editor_may_fail"])
        wins = {group[0].example["id"]: [s.graded.rewards[WIN] for s in group] for group in kept}
    wins = hosts.agree(wins)
    kept = [
        [_won(s, win - 0.5) for s, win in zip(group, wins[group[0].example["id"]], strict=True)]
        for group in groups
        if group[0].example["id"] in wins
    ]
    if dropped := len(groups) - len(kept):
        hosts.say(f"the judge failed on {dropped} of {len(groups)} problems, which are left out")
    return kept, dropped


def table(evals: Sequence[dict[str, Any]]) -> str:
    """Records of benchmarks as text."""
    lines = [
        f"{'benchmark':<14} {'problems':>8} {'k':>4} {'score':>7} {'95% interval':>16} {'cons@k':>7} {'cut off':>8} "
        f"{'tokens':>8} {'overlap':>8}"
    ]
    for r in evals:
        low, high = r["score_ci"]
        vote = f"{r['cons_at_k']:.1%}" if "cons_at_k" in r else "-"
        overlap = f"{r['decontamination']['share']:.1%}" if r["decontamination"] else "unknown"
        lines.append(
            f"{r['benchmark']:<14} {r['n_problems']:>8} {r['k']:>4} {r['score']:>7.1%} {low:>7.1%} to{high:>6.1%} "
            f"{vote:>7} {r['truncated_share']:>8.1%} {r['mean_completion_tokens']:>8.1f} {overlap:>8}  {r['metric']}"
        )
    return "\n".join(lines)
