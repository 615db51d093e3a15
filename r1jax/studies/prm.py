"""A process reward model: the chance to end right after each step of a completion (R1 report, "unsuccessful attempts").

Labels are Monte Carlo estimates, as in Math-Shepherd (arXiv 2312.08935): the policy goes on from the end of each step
several times. The model then chooses among samples of held-out problems, and at last is the only reward of GRPO: there
its score should rise while the accuracy, which nothing rewards, does not.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from r1jax import curate, hosts
from r1jax.held_out import prepare
from r1jax.reinforce import General, reinforce
from r1jax.rollout import Group, Sample
from r1jax.run import CURATION, Config, Policy, Run, Stopped, decode_layout, open_pool
from r1jax.sampler import Interrupted
from r1jax.studies import rerank, values
from r1jax.studies.segments import Start, open_writer, step_ends, step_marks, success_after

MEASURE = "accuracy"
NAME = "process"  # of the model's score among the rewards
SIZES = (1, 2, 4, 8, 16)


def check(config: Config, _: pathlib.Path) -> None:
    """Raises ValueError for settings that the study cannot work with; the pipeline asks before the first stage."""
    c = config["prm"]
    if c["together"] not in rerank.TOGETHER:
        raise ValueError(f"config.prm.together is {c['together']!r}, wanted one of {', '.join(rerank.TOGETHER)}")
    if c["continuations"] < 1:
        raise ValueError(f"config.prm.continuations is {c['continuations']}, wanted 1 or more")
    if MEASURE not in config["rewards"]:
        raise ValueError(f'config.rewards has no "{MEASURE}", which says what is right; its weight may be 0')


def gather(run: Run, config: Config, policy: Policy) -> list[dict[str, Any]]:
    """Completions of the policy, the ends of their steps, and the share of continuations from there that end right.

    Raises:
        run.Stopped: SIGTERM came; finished parts are kept.
    """
    writer, ends = open_writer(run, config, policy, config["curate"]["temperature"]), step_marks(policy.tokenizer)
    key, c = jax.random.fold_in(jax.random.key(run.seed), CURATION), config["prm"]
    with open_pool(config) as pool:

        def use(groups: list[Group]) -> dict[str, Any]:
            rows, starts = [], []
            for s in (s for group in groups for s in group):
                tokens = s.completion.tokens.tolist()
                at = step_ends(tokens, ends)
                starts += [Start(s.example, s.prompt, s.prompt_tokens, tuple(tokens[: i + 1])) for i in at]
                rows.append({"prompt": list(s.prompt_tokens), "tokens": tokens, "ends": at})
            # Every part has draws of its own.
            branch = jax.random.fold_in(jax.random.fold_in(key, 1), groups[0][0].completion.prompt)
            found = iter(success_after(writer, pool, starts, c["continuations"], branch, MEASURE).tolist())
            return {"rows": [{**row, "success": [next(found) for _ in row["ends"]]} for row in rows]}

        parts = curate.sample_parts(run, config, policy, config["data"]["source"], run.stage, use)
    return [row for part in parts for row in part["rows"]]


def targets_of(row: dict[str, Any]) -> np.ndarray:
    """The labels [C] of a completion, NaN where no step ends."""
    out = np.full(len(row["tokens"]), np.nan, np.float32)
    out[row["ends"]] = row["success"]
    return out


def chance(logits: np.ndarray) -> np.ndarray:
    """Of success."""
    return 1.0 / (1.0 + np.exp(-logits.astype(np.float64)))


def step_scores(valuer: values.Valuer, policy: Policy, samples: Sequence[Sample]) -> list[np.ndarray]:
    """The model's chances of success after each step of each sample."""
    ends = step_marks(policy.tokenizer)
    read = [s.completion.tokens.tolist() for s in samples]
    found = valuer([(s.prompt_tokens, tokens) for s, tokens in zip(samples, read, strict=True)])
    return [chance(logits[step_ends(tokens, ends)]) for logits, tokens in zip(found, read, strict=True)]


def explained(valuer: values.Valuer, rows: Sequence[dict[str, Any]]) -> float:
    """Share of the labels' variance that the model explains on rows that it has not learned from."""
    found = valuer([(row["prompt"], row["tokens"]) for row in rows])
    scores = np.concatenate([chance(logits[row["ends"]]) for logits, row in zip(found, rows, strict=True)])
    labels = np.concatenate([row["success"] for row in rows])
    return float(1 - ((scores - labels) ** 2).mean() / max(labels.var(), 1e-9))


def sample_held_out(run: Run, config: Config, policy: Policy) -> list[Group]:
    """Graded completions of the held-out problems."""
    weights = decode_layout(policy, run.layouts["decode"], config["model"]["compute_dtype"])(policy.params)
    with open_pool(config) as pool:
        problems = prepare(run, config, policy, pool)
        try:
            return problems.sample(weights, config["rl"]["max_completion_tokens"])
        except Interrupted as stopped:
            raise Stopped from stopped


def candidates_of(
    valuer: values.Valuer, policy: Policy, groups: Sequence[Group], measure: str = MEASURE
) -> list[list[rerank.Candidate]]:
    """Completions of each problem with the model's scores."""
    scores = iter(step_scores(valuer, policy, [s for group in groups for s in group]))
    return [[rerank.candidate(s, next(scores), measure) for s in group] for group in groups]


def as_reward(valuer: values.Valuer, policy: Policy, together: str, groups: list[Group]) -> list[Group]:
    """The groups with the model's score as the only reward; what the rules say of them is kept to be looked at."""
    scores = iter(step_scores(valuer, policy, [s for group in groups for s in group]))

    def one(s: Sample) -> Sample:
        score = rerank.TOGETHER[together](next(scores))
        rewards = {**s.graded.rewards, NAME: score}
        return dataclasses.replace(s, graded=dataclasses.replace(s.graded, rewards=rewards, reward=score))

    return [[one(s) for s in group] for group in groups]


def optimised(run: Run) -> list[dict[str, Any]]:
    """What each rollout said while the model's score was the reward: step, score, accuracy, tokens."""
    records = map(json.loads, (run.workdir / "metrics.jsonl").read_text("utf-8").splitlines())
    named = {"score": f"reward/{NAME}/mean", "accuracy": f"reward/{MEASURE}/mean", "tokens": "length/mean"}
    return [
        {"step": r["step"] - 1, **{name: r[key] for name, key in named.items()}}
        for r in records
        if r["stage"] == run.stage and named["score"] in r
    ]


def report(run: Run, text: str, found: dict[str, Any]) -> None:
    """Leaves tables in WORKDIR/STAGE.txt and STAGE.json."""
    hosts.atomic_write(run.workdir / f"{run.stage}.txt", text)
    hosts.atomic_write(run.workdir / f"{run.stage}.json", json.dumps(found, indent=1) + "\n")


def stage(run: Run, config: Config, policy: Policy) -> Policy:
    """Teaches the model, chooses with it, and optimises against it; the policy left is the one optimised.

    Leaves WORKDIR/STAGE.txt and STAGE.json.
    """
    c = config["prm"]
    rows = gather(run, config, policy)
    n_valid = max(1, len(rows) // 8)
    learned, valid = rows[:-n_valid], rows[-n_valid:]
    reads = [(row["prompt"], row["tokens"]) for row in learned]
    this = dataclasses.replace(run, stage=f"{run.stage}_model")
    valuer = values.teach(this, config, policy, reads, [targets_of(row) for row in learned])

    problems = candidates_of(valuer, policy, sample_held_out(run, config, policy))
    sizes = [n for n in SIZES if n <= len(problems[0])]
    chosen, share = rerank.table(problems, sizes), explained(valuer, valid)
    labels = sum(len(row["ends"]) for row in learned)
    text = (
        f"{labels} labelled steps of {len(learned)} completions, {c['continuations']} continuations each; the model "
        f"explains {share:.1%} of the variance of {sum(len(row['ends']) for row in valid)} others\n\n"
        + rerank.as_text(f"right, of {len(problems)} problems, with n samples", sizes, chosen)
    )
    report(run, text, {"labels": labels, "explained": share, "sizes": sizes, "chosen": chosen})

    judge = General(
        mix=lambda stream: stream,
        judge=lambda groups: as_reward(valuer, policy, c["together"], groups),
    )
    left = reinforce(run, config, policy, judge)
    steps = optimised(run)
    text += f"\nGRPO with the {c['together']} score as the only reward (training prompts)\n"
    text += "updates   score  accuracy  tokens\n"
    text += "".join(f"{s['step']:7}{s['score']:8.3f}{s['accuracy']:10.1%}{s['tokens']:8.1f}\n" for s in steps)
    report(run, text, {"labels": labels, "explained": share, "sizes": sizes, "chosen": chosen, "optimised": steps})
    hosts.say(text.rstrip())
    return left
