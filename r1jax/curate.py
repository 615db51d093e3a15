"""Rejection sampling: completions of a policy, graded, filtered, rewritten, written out for others to use.

The report samples several completions per prompt and keeps those that are correct and readable (sections 2.3.1 and
2.3.3). What is kept lies in WORKDIR/data/STAGE.jsonl in chat format, how many each filter dropped beside it. Prompts
are gone through in parts, each saved whole, so that a run that was cut short goes on with the part it was at.
"""

import collections
import dataclasses
import json
import pathlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from r1jax import conversations, data, draw, hosts, letters, metrics, queries, sources
from r1jax.editor import Verifier, open_editor, open_verifier
from r1jax.rewards.form import format_reward
from r1jax.rewards.language import language_reward
from r1jax.rewards.penalties import repetition_penalty
from r1jax.rewards.table import GRADERS, accuracy, canonical_answer
from r1jax.rewards.worth import reply_of
from r1jax.rollout import Group, Sample, collect
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
from r1jax.sampler import Interrupted
from r1jax.types import Example

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


# Those that ask how a sample came about; the others read its text alone, also when it has been rewritten.
OF_SAMPLING = ("whole", "correct")


def check_filters(config: Config) -> None:
    """Raises ValueError for a filter that does not exist, or that nothing grades for."""
    c = config["curate"]
    for name in c["filters"]:
        if name not in FILTERS:
            raise ValueError(f"config.curate.filters names {name!r}, wanted some of {', '.join(FILTERS)}")
    if "correct" in c["filters"] and "accuracy" not in config["rewards"] and not c["judge"]:
        raise ValueError(
            'config.curate.filters has "correct", but config.rewards has no "accuracy" and config.curate.judge is empty'
        )


def has_rule(example: Example, config: Config) -> bool:
    """Whether a rule says if an answer to the example is right."""
    return "accuracy" in config["rewards"] and example["grader"] in GRADERS and example["grader"] != "judged"


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


def unfit(s: Sample, rewritten: str | None, config: Config, judge: Verifier | None = None) -> str | None:
    """Why what an editor made of a sample cannot be learned from, None if it can: a filter, or another answer."""
    if not isinstance(rewritten, str) or not rewritten.strip():
        return "editor"
    edited = dataclasses.replace(s, text=rewritten)
    for name in config["curate"]["filters"]:
        if name not in OF_SAMPLING and not FILTERS[name](edited, config["curate"]):
            return f"editor: {name}"
    marked = config["grading"]["marked_answers"]
    before, after = (canonical_answer(s.prompt, text, s.example, marked) for text in (s.text, rewritten))
    if before != after:
        return "editor: answer"
    if before is None and "correct" in config["curate"]["filters"]:
        # Free text, of which there is nothing to compare: who called it right is asked again.
        if has_rule(s.example, config):
            is_right = accuracy(s.prompt, rewritten, s.example, marked_answers=marked) > 0.5
        else:
            is_right = judge is not None and judge(s.example, reply_of(rewritten)) is True
        return None if is_right else "editor: answer"
    return None


def judged_right(group: Group, judge: Verifier) -> Group:
    """The samples that a judge has an opinion of, which stands in for accuracy where no rule grades (section 2.3.3).

    It reads the reply, never the thought.
    """
    opinions = [judge(s.example, reply_of(s.text)) for s in group]
    return [
        dataclasses.replace(
            s, graded=dataclasses.replace(s.graded, rewards={**s.graded.rewards, "accuracy": float(is_right)})
        )
        for s, is_right in zip(group, opinions, strict=True)
        if is_right is not None
    ]


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
                part = hosts.agree(make(i))  # one host alone asks editors and judges
                if "error" in part:
                    raise ValueError(part["error"])
                if hosts.is_writer():
                    hosts.atomic_write(path, json.dumps(part, ensure_ascii=False))
                progress.step(i + 1, {})
                parts.append(part)
            else:
                parts.append(json.loads(path.read_text("utf-8")))
    finally:
        progress.close()
    return parts


def told(use: Callable[[list[Group]], dict[str, Any]], groups: list[Group]) -> dict[str, Any]:
    """What `use` makes of groups, or why it cannot: every host has to stop for what one of them found out."""
    try:
        return use(groups)
    except ValueError as error:
        return {"error": str(error)}


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
        ValueError: whatever `use` raised on any host.
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
            if run.is_interrupted():
                raise Interrupted
            return told(use, groups)

        try:
            return parts_of(run, name, -(-total // size), make)
        except Interrupted as stopped:
            raise Stopped from stopped


# So many have to be asked before their share of failures says anything.
ENOUGH = 32
Asked = dict[str, list[int]]  # what models were asked and failed at: two counts by the key that names one


def note(asked: Asked, key: str, count: int, failed: int) -> None:
    """Adds to the counts of one model."""
    before = asked.get(key, (0, 0))
    asked[key] = [before[0] + count, before[1] + failed]


def check_failures(asked: Asked, may_fail: float, enough: int = ENOUGH) -> None:
    """Says when a model fails too often.

    Raises:
        ValueError: of `enough` or more, more than the share `may_fail` failed; names the key.
    """
    for key, (count, failed) in asked.items():
        if count >= enough and failed > may_fail * count:
            raise ValueError(
                f"{key} gave nothing usable for {failed} of {count}; see it and config.curate.editor_may_fail"
            )


def asked_in(parts: Sequence[Mapping[str, Any]]) -> Asked:
    """What models were asked and failed at in all parts together."""
    total: Asked = {}
    for part in parts:
        for key, (count, failed) in part.get("asked", {}).items():  # parts of earlier versions do not say
            note(total, key, count, failed)
    return total


def reject(run: Run, config: Config, policy: Policy) -> tuple[list[dict[str, Any]], collections.Counter[str]]:
    """Conversations that the policy wrote and that pass every filter, and how many were dropped for what.

    Raises:
        ValueError: nothing is left, or the editor or the judge fails too often.
    """
    check_filters(config)
    c, total = config["curate"], {}
    edit = open_editor(c["editor"], c["editor_timeout_s"], c["editor_tries"])
    judge = open_verifier(c["judge"], c["editor_timeout_s"], c["editor_tries"])

    def use(groups: list[Group]) -> dict[str, Any]:
        if not hosts.is_writer():  # one host asks for all
            return {}
        counts, lines, asked = collections.Counter(), [], {}

        def heard(key: str, count: int, failed: int) -> None:
            for each in (asked, total):
                note(each, key, count, failed)
            check_failures(total, c["editor_may_fail"])

        for group in groups:
            if judge is not None and not has_rule(group[0].example, config):
                count, group = len(group), judged_right(group, judge)
                silent = count - len(group)
                counts += collections.Counter({"sampled": silent, "dropped by judge": silent})
                heard("config.curate.judge", count, silent)
            kept, dropped = keep(group, config)
            counts += dropped
            for s in kept:
                question, text = s.example["question"], s.text.strip()
                if edit is not None:
                    text = edit(question, text)
                    why = unfit(s, text, config, judge)
                    heard("config.curate.editor", 1, why is not None)
                    if why is not None:
                        counts[f"dropped by {why}"] += 1
                        continue
                lines.append(conversation(question, text, id=s.example["id"], source=run.stage))
        return {"lines": lines, "counts": counts, "asked": asked}

    parts = sample_parts(run, config, policy, config["data"]["source"], run.stage, use)
    check_failures(asked_in(parts), c["editor_may_fail"], enough=1)
    counts = sum((collections.Counter(part["counts"]) for part in parts), collections.Counter())
    lines = [line for part in parts for line in part["lines"]]
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
        (general, taken), sampler = general_data(config, run.seed), config["curate"]["sampler"]
        lines, counts = reject(run, config, run.policy_of(sampler) if sampler else policy)
        write(run, lines + general, {"sampling": counts, "general": taken})
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


def _letters(seed: int, n: int) -> list[dict[str, Any]]:
    written = enumerate(letters.written_examples(seed, n))
    return [conversation(question, reply, id=f"{letters.ID}{i}", source="letters") for i, (question, reply) in written]


def _general(seed: int, n: int) -> list[dict[str, Any]]:
    written = enumerate(queries.general_examples(seed, n))
    return [conversation(question, reply, id=f"{kind}-{i}", source=kind) for i, (kind, question, reply) in written]


# General data that is written by rule, as config.curate.general names it: of a seed, so many.
WRITERS: dict[str, Callable[[int, int], list[dict[str, Any]]]] = {"letters": _letters, "general": _general}


def general_data(config: Config, seed: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Conversations of config.curate.general, and how many there were and were taken.

    Of a chat file, a draw if there are more than asked for; "letters" and "general" by the packaged writers.

    Raises:
        ValueError: no such file, a line of it is no conversation, or it gives none.
    """
    c = config["curate"]
    if not c["general"]:
        return [], {}
    if c["general"] in WRITERS:
        lines = WRITERS[c["general"]](seed, c["general_examples"])
        if not lines:
            raise ValueError(f"config.curate.general_examples is 0: {c['general']} has no end, say how many")
        return lines, {"taken": len(lines)}
    lines = []
    for number, record in sources.read_records(c["general"], "config.curate.general"):
        conversations.messages_of(record, f"{c['general']}, line {number}")
        lines.append({"source": "general", **record})
    if not lines:
        raise ValueError(f"config.curate.general: {c['general']} holds no conversation")
    most = min(c["general_examples"] or len(lines), len(lines))
    drawn = random.Random(f"general {seed}").sample(lines, most) if most < len(lines) else lines
    return drawn, {"there": len(lines), "taken": most}
