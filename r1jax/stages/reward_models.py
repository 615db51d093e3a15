"""Reward models (R1 report, section 2.3.4): helpfulness from judged pairs, safety from labelled responses.

Both have the policy's architecture with a scalar head and start from its weights.
"""

import collections
import dataclasses
import json
import pathlib
import random
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from r1jax import checks, curate, data, hosts, preference, scorers
from r1jax.rollout import Group
from r1jax.run import Policy, Run, model_folder, trained

MODELS = {"helpful": "pairwise", "safe": "pointwise"}


def check(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Raises ValueError where a judge, safety rule or sampler is not there, or nothing apart to measure on."""
    c = config.preference
    if c.split == c.valid_split:
        raise ValueError(f"config.preference.split and valid_split are both {c.split!r}, and the models learn from one")
    data.apart(c.valid_source, c.source, "config.preference.valid_source")
    preference.open_judge(c.judge, config.curate.editor_timeout_s, config.curate.editor_tries)
    preference.open_safety(c.safety)
    checks.check_sampler(config, workdir)


def gather(run: Run, config: ConfigDict, sampler: Policy, source: str, split: str) -> dict[str, list[dict[str, Any]]]:
    """Judged pairs and labelled responses on the general prompts of a source's split, written to WORKDIR/data.

    Raises:
        ValueError: no pair is left.
    """
    c = config.preference
    path = run.workdir / "data" / f"{run.stage}-{split}.json"
    if hosts.agree(path.exists()):
        return json.loads(path.read_text("utf-8"))["data"]
    judge = preference.open_judge(c.judge, config.curate.editor_timeout_s, config.curate.editor_tries)
    is_safe, may_fail, total = preference.open_safety(c.safety), config.curate.editor_may_fail, {}
    own = config.copy_and_resolve_references()
    own.data.split = split

    def use(groups: list[Group]) -> dict[str, Any]:
        if not hosts.is_writer():  # one host asks for all
            return {}
        pairs: list[dict[str, Any]] = []
        counts: collections.Counter[str] = collections.Counter()
        asked: curate.Asked = {}

        def heard(key: str, count: int, failed: int) -> None:
            for each in (asked, total):
                curate.note(each, key, count, failed)
            curate.check_failures(total, may_fail)

        for group in groups:
            found, why = preference.pairs_of(group, judge, c.judgements, c.margin)
            pairs += found
            counts += why
            heard("config.preference.judge", why["pairs"] - why["alike or empty"], why["judge failed"])
        labelled = []
        for s in (s for group in groups for s in group):
            safe = is_safe(s.example, s.text)
            heard("config.preference.safety", 1, safe is None)
            if safe is None:
                counts["unlabelled"] += 1
            else:
                labelled.append({"question": s.example["question"], "response": s.text, "safe": bool(safe)})
        return {"pairs": pairs, "labelled": labelled, "counts": counts, "asked": asked}

    parts = curate.sample_parts(run, own, sampler, source, f"{run.stage}-{split}", use, is_general=True)
    curate.check_failures(curate.asked_in(parts), may_fail, enough=1)
    judged = [pair for part in parts for pair in part["pairs"]]
    pairs = preference.balance(judged, lambda reply: len(sampler.tokenizer.encode(reply)), run.seed)
    counts = dict(sum((collections.Counter(part["counts"]) for part in parts), collections.Counter()))
    hosts.say(f"{run.stage}, {split}: {len(pairs)} pairs balanced by length of {counts}")
    if not pairs:
        raise ValueError(
            f"{run.stage}: no pair of split {split} is left ({counts}); see config.preference.margin and judge"
        )
    labelled = [one for part in parts for one in part["labelled"]]
    kept = random.Random(f"labelled {run.seed}").sample(labelled, min(len(labelled), c.safety_responses))
    made = {"pairs": pairs, "labelled": kept}
    if hosts.is_writer():
        hosts.atomic_write(path, json.dumps({"counts": counts, "data": made}, ensure_ascii=False))
    return made


def rows(config: ConfigDict, policy: Policy, made: dict[str, list], model: str) -> dict[str, np.ndarray]:
    """The rows [N, 2 or 1, T] that a reward model learns from."""
    if model == "helpful":
        each = [(p["question"], preference.summary(p[key])) for p in made["pairs"] for key in ("chosen", "rejected")]
        labels, per_item = [], 2
    else:
        each = [(one["question"], one["response"]) for one in made["labelled"]]
        labels, per_item = [float(one["safe"]) for one in made["labelled"]], 1
    length, template = config.preference.row_tokens, config.data.template
    arrays, fits = preference.rows_of(each, policy.tokenizer, template, length, labels)
    whole = fits.reshape(-1, per_item).all(1)
    if not whole.all():
        hosts.say(
            f"{model}: {(~whole).sum()} of {len(whole)} are longer than config.preference.row_tokens and left out"
        )
    if not whole.any():
        raise ValueError(f"{model}: nothing fits into config.preference.row_tokens ({length})")
    return {name: a.reshape(-1, per_item, length)[whole] for name, a in arrays.items()}


def unsafe_share(rows: dict[str, np.ndarray]) -> float:
    """Of labelled responses [N, 1, T]; the label of a safe one is 1 at its last token."""
    return float(1 - rows["label"].sum((1, 2)).mean())


def check_labels(safe: Sequence[float]) -> None:
    """Raises ValueError if there is nothing to tell apart."""
    if len(set(safe)) < 2:
        raise ValueError(
            f"config.preference.safety says the same of all {len(safe)} responses ({'' if any(safe) else 'un'}safe), "
            "so there is nothing to learn"
        )


def stage(run: Run, config: ConfigDict, policy: Policy) -> Policy:
    """Trains both models; leaves them in WORKDIR/models/STAGE and the policy as it is.

    Raises:
        ValueError: no pair is left, or all responses have one label.
    """
    c = config.preference
    apart = data.apart(c.valid_source, c.source, "config.preference.valid_source")
    sampler = run.policy_of(config.curate.sampler) if config.curate.sampler else policy
    train, valid = (
        gather(run, config, sampler, source, split) for source, split in ((c.source, c.split), (apart, c.valid_split))
    )
    check_labels([float(one["safe"]) for one in train["labelled"]])  # before anything is trained
    out = model_folder(run.workdir, run.stage)
    new = out.with_name(f".{out.name}.new")
    for name, loss in MODELS.items():
        this = dataclasses.replace(run, stage=f"{run.stage}_{name}")
        learned, held_out = (rows(config, policy, made, name) for made in (train, valid))
        if name == "safe":
            check_labels(learned["label"].sum((1, 2)))
        params, scores = scorers.train(this, config, policy, loss, learned, held_out)
        flat = {key: a.reshape(-1, a.shape[-1]) for key, a in held_out.items()}
        report = scorers.measured(scores, loss, flat) | {"held_out": len(scores)}
        if name == "safe":
            report |= {"unsafe_share": unsafe_share(learned), "held_out_unsafe_share": unsafe_share(held_out)}
            hosts.say(f"{run.stage}: {report['unsafe_share']:.1%} of {len(learned['label'])} responses are unsafe, "
                      f"{report['held_out_unsafe_share']:.1%} of the held-out ones")  # fmt: skip
        hosts.say(f"{run.stage}: {name} is right on {report['eval/accuracy']:.1%} of {len(scores)} held-out rows, "
                  f"correlation of score and length {report['eval/length_correlation']:+.2f}")  # fmt: skip
        scorers.save(new / name, policy, trained(this, params), report)
    if hosts.is_writer():
        shutil.rmtree(out, ignore_errors=True)
        new.rename(out)
    return policy
