"""Rejection sampling: completions of a policy, graded, filtered, rewritten, written out for others to use.

The report samples several completions per prompt and keeps those that are correct and readable (sections 2.3.1 and
2.3.3). What is kept lies in WORKDIR/data/STAGE.jsonl in chat format, how many each filter dropped beside it. Prompts
are gone through in parts, each saved whole, so that a run that was cut short goes on with the part it was at.
"""

import collections
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from r1jax import conversations, data, draw, hosts, letters, metrics, sources
from r1jax.editor import open_editor
from r1jax.rewards.form import format_reward
from r1jax.rewards.language import language_reward
from r1jax.rewards.penalties import repetition_penalty
from r1jax.rollout import Group, Interrupted, Sample, collect
from r1jax.run import (
    CURATION,
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

# What a sample must be to be kept: filters by name, of a sample and config.curate.
FILTERS: dict[str, Callable[[Sample, Config], bool]] = {
    "whole": lambda s, c: s.completion.stop == "stop",
    "correct": lambda s, c: s.graded.rewards["accuracy"] > 0.5,
    "format": lambda s, c: format_reward(s.prompt, s.text, s.example) > 0.5,
    "language": lambda s, c: language_reward(s.prompt, s.text, s.example) >= c["min_language"],
    "repetition": lambda s, c: -repetition_penalty(s.prompt, s.text, s.example) <= c["max_repetition"],
    "length": lambda s, c: len(s.text) <= c["max_characters"],
    "paragraphs": lambda s, c: max(map(len, s.text.split("\n\n"))) <= c["max_paragraph_characters"],
    "code": lambda s, c: "```" not in s.text,
}


def check_filters(config: Config) -> None:
    """Raises ValueError for a filter that does not exist, or that nothing grades for."""
    for name in config["curate"]["filters"]:
        if name not in FILTERS:
            raise ValueError(f"config.curate.filters names {name!r}, wanted some of {', '.join(FILTERS)}")
    if "correct" in config["curate"]["filters"] and "accuracy" not in config["rewards"]:
        raise ValueError('config.curate.filters has "correct", but config.rewards has no "accuracy"')


def conversation(question: str, reply: str, **more: Any) -> dict[str, Any]:
    """A line in chat format."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return {"messages": messages, **more}


def keep(group: Group, config: Config) -> tuple[list[Sample], collections.Counter[str]]:
    """The samples of a group that pass every filter, the first of each kind, and how many each filter dropped."""
    c, counts, kept = config["curate"], collections.Counter(sampled=len(group)), []
    for s in group:
        failed = next((name for name in c["filters"] if not FILTERS[name](s, c)), None)
        if failed is None and s.text in (one.text for one in kept):
            failed = "duplicate"
        if failed is None and len(kept) == c["keep_per_prompt"]:
            failed = "surplus"
        if failed is None:
            kept.append(s)
        else:
            counts[f"dropped by {failed}"] += 1
    return kept, counts


def parts_of(run: Run, name: str, count: int, make: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts of a piece of work in their order; a part that is there already is read, not made again."""
    folder = run.workdir / "data" / name
    done = hosts.agree([(folder / f"part-{i:05d}.json").exists() for i in range(count)])
    parts = []
    progress = metrics.Progress(name, count, sum(done))
    try:
        for i in range(count):
            path = folder / f"part-{i:05d}.json"
            if not done[i]:
                part = hosts.agree(make(i))  # an editor may have told each host something else
                if hosts.is_writer():
                    hosts.atomic_write(path, json.dumps(part, ensure_ascii=False))
                progress.step(i + 1, {})
                parts.append(part)
            else:
                parts.append(json.loads(path.read_text("utf-8")))
    finally:
        progress.close()
    return parts


def sample_parts(
    run: Run,
    config: Config,
    policy: Policy,
    source: str,
    name: str,
    use: Callable[[list[Group]], dict[str, Any]],
    is_general: bool = False,
) -> list[dict[str, Any]]:
    """What `use` makes of the graded groups of each part of the prompts, in order; see config.curate.

    Args:
        is_general: whether the prompts are instructions without a right answer.

    Raises:
        run.Stopped: SIGTERM came; finished parts are kept.
    """
    c, prompts = config["curate"], config["data"]
    limit = config["rl"]["max_completion_tokens"]
    check_lengths(policy, prompts["max_prompt_tokens"], limit)
    stream = data.PromptStream(open_source(config, source, prompts["split"], is_general), run.seed)
    total = min(c["prompts"], len(stream.source.examples))
    size = c["prompts_per_part"]
    drawing = draw.DrawConfig(temperature=c["temperature"])
    verbs = make_verbs(config, policy, run.layouts["decode"], drawing)
    weights = decode_layout(policy, run.layouts["decode"], config["model"]["compute_dtype"])(policy.params)
    key = jax.random.fold_in(jax.random.key(run.seed), CURATION)

    with open_pool(config) as pool:

        def make(i: int) -> dict[str, Any]:
            first = i * size
            groups = collect(
                verbs, weights, policy.tokenizer, pool, stream.take(first, min(size, total - first)),
                prompts["template"], c["samples"], key, first, prompts["max_prompt_tokens"], limit,
                tuple(config["rl"]["stop_texts"]), run.is_interrupted,
            )  # fmt: skip
            if hosts.any_across(run.stop.requested):
                raise Interrupted
            return use(groups)

        try:
            return parts_of(run, name, -(-total // size), make)
        except Interrupted as stopped:
            raise Stopped from stopped


def reject(run: Run, config: Config, policy: Policy) -> tuple[list[dict[str, Any]], collections.Counter[str]]:
    """Conversations that the policy wrote and that pass every filter, and how many were dropped for what.

    Raises:
        ValueError: nothing is left, or the editor fails too often.
    """
    check_filters(config)
    c = config["curate"]
    # One host asks the editor for all.
    edit = open_editor(c["editor"], c["editor_timeout_s"], c["editor_tries"]) if hosts.is_writer() else None

    def use(groups: list[Group]) -> dict[str, Any]:
        counts, lines = collections.Counter(), []
        for group in groups:
            kept, dropped = keep(group, config)
            counts += dropped
            for s in kept:
                question, text = s.example["question"], s.text.strip()
                rewritten = text if edit is None else edit(question, text)
                if rewritten is None:
                    counts["dropped by editor"] += 1
                    continue
                lines.append(conversation(question, rewritten, id=s.example["id"], source=run.stage))
        return {"lines": lines, "counts": counts}

    parts = sample_parts(run, config, policy, config["data"]["source"], run.stage, use)
    counts = sum((collections.Counter(part["counts"]) for part in parts), collections.Counter())
    lines = [line for part in parts for line in part["lines"]]
    failed = counts["dropped by editor"]
    if failed > c["editor_may_fail"] * max(failed + len(lines), 1):
        raise ValueError(
            f"{run.stage}: the editor gave nothing for {failed} of {failed + len(lines)} samples; "
            "see config.curate.editor and editor_may_fail"
        )
    if not lines:
        dropped = ", ".join(f"{count} {why}" for why, count in counts.items())
        raise ValueError(f"{run.stage}: no sample is left to learn from ({dropped}); see config.curate.filters")
    return lines, counts


def gather(run: Run, config: Config, policy: Policy) -> pathlib.Path:
    """The data of this stage, WORKDIR/data/STAGE.jsonl: made once, of config.curate.sampler's samples and general data.

    Raises:
        ValueError: see `reject` and `general_data`.
    """
    path = run.workdir / "data" / f"{run.stage}.jsonl"
    if not hosts.agree(path.exists()):
        general, sampler = general_data(config, run.seed), config["curate"]["sampler"]
        lines, counts = reject(run, config, run.policy_of(sampler) if sampler else policy)
        write(run, lines + general, {"sampling": counts})
    return path


def write(run: Run, lines: Sequence[dict[str, Any]], counts: dict[str, Any]) -> None:
    """Writes WORKDIR/data/STAGE.jsonl and, before it, the manifest: where the data is, its manifest is too."""
    path = run.workdir / "data" / f"{run.stage}.jsonl"
    sources = collections.Counter(line["source"] for line in lines)
    manifest = {"conversations": len(lines), "by_source": dict(sources), **counts}
    if hosts.is_writer():
        text = json.dumps(manifest, ensure_ascii=False, indent=1) + "\n"
        hosts.atomic_write(path.with_suffix(".manifest.json"), text)
        hosts.atomic_write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    hosts.say(f"{run.stage}: {_in_words(manifest['by_source'])} in {path}; {_in_words(counts.get('sampling', {}))}")


def _in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in counts.items())


def general_data(config: Config, seed: int) -> list[dict[str, Any]]:
    """Conversations of config.curate.general: a chat file, or "letters" by the packaged writers.

    Raises:
        ValueError: no such file, or a line of it is no conversation.
    """
    c = config["curate"]
    if not c["general"]:
        return []
    if c["general"] == "letters":
        written = enumerate(letters.written_examples(seed, c["general_examples"]))
        return [
            conversation(question, reply, id=f"{letters.ID}{i}", source="letters") for i, (question, reply) in written
        ]
    lines = []
    for number, record in sources.read_records(c["general"], "config.curate.general"):
        conversations.messages_of(record, f"{c['general']}, line {number}")
        lines.append({"source": "general", **record})
    return lines[: c["general_examples"]]
