"""Tree search over the steps of a completion, led by a value model (R1 report, "unsuccessful attempts").

The value model learns from whole samples how they end, at every token. For held-out problems a tree grows by the step
that PUCT picks: the policy draws a few continuations of it, the model values them. What it finds is held against plain
sampling with as many tokens drawn for the same problem.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from r1jax import curate, hosts
from r1jax.rewards.pool import RewardPool
from r1jax.rollout import Group
from r1jax.run import EVALUATION, Config, Policy, Run, Stopped, open_pool
from r1jax.sampler import Interrupted
from r1jax.studies import rerank, tree, values
from r1jax.studies.prm import MEASURE, candidates_of, chance, report, sample_held_out
from r1jax.studies.segments import Start, Writer, grade, open_writer, step_marks

# Searches of a tree in a row that may end at completions that are whole already, and so draw nothing.
FREE_SEARCHES = 32
# Ways to choose that need nothing but what a tree has.
SHOWN = ("majority", "best by last score", "vote by last score", "any of them")


@dataclasses.dataclass(frozen=True)
class MctsConfig:
    """See configs/base.py."""

    branches: int
    segment_tokens: int
    exploration: float
    budgets: tuple[int, ...]

    def __post_init__(self) -> None:
        for key in ("branches", "segment_tokens"):
            if getattr(self, key) < 1:
                raise ValueError(f"config.mcts.{key} is {getattr(self, key)}, wanted 1 or more")
        if not self.budgets or list(self.budgets) != sorted(self.budgets):
            raise ValueError(f"config.mcts.budgets is {self.budgets}, wanted numbers of tokens in ascending order")


@dataclasses.dataclass
class Search:
    """The tree of a problem, the tokens drawn for it, and its whole completions when each budget was used up."""

    start: Start
    root: tree.Node
    drawn: int = 0
    found: list[tuple[int, list[tree.Node]]] = dataclasses.field(default_factory=list)


def gather(run: Run, config: Config, policy: Policy) -> list[dict[str, Any]]:
    """Completions of the policy and whether they are right; raises run.Stopped as curate.sample_parts."""

    def use(groups: list[Group]) -> dict[str, Any]:
        return {
            "rows": [
                {
                    "prompt": list(s.prompt_tokens),
                    "tokens": s.completion.tokens.tolist(),
                    "right": s.graded.rewards[MEASURE] > 0.5,
                }
                for group in groups
                for s in group
            ]
        }

    parts = curate.sample_parts(run, config, policy, config["data"]["source"], run.stage, use)
    return [row for part in parts for row in part["rows"]]


def next_leaf(search: Search, exploration: float) -> tree.Node | None:
    """The node to go on from; None where every search ends at a completion that is whole."""
    for _ in range(FREE_SEARCHES):
        leaf = tree.select(search.root, exploration)
        if not leaf.is_whole:
            return leaf
        tree.back_up(leaf, leaf.value)
    return None


def grow(
    searches: Sequence[Search], writer: Writer, valuer: values.Valuer, settings: MctsConfig, key: jax.Array
) -> None:
    """Searches all problems side by side until each has used up the last budget, or its tree holds nothing new.

    Raises:
        Interrupted: the run was asked to stop.
    """
    ends = step_marks(writer.tokenizer)

    def cut(tokens: list[int]) -> int | None:
        return next((i + 1 for i, token in enumerate(tokens) if ends(token)), None)

    going, turn = list(searches), 0
    while going:
        chosen = [(s, leaf) for s in going if (leaf := next_leaf(s, settings.exploration)) is not None]
        stuck = {id(s) for s in going} - {id(s) for s, _ in chosen}
        if chosen:
            starts = [s.start.after(leaf.tokens) for s, leaf in chosen]
            branch = jax.random.fold_in(key, turn)
            drawn = writer.go_on(starts, settings.branches, branch, cut, settings.segment_tokens)
            children = []
            for (s, leaf), completions in zip(chosen, drawn, strict=True):
                s.drawn += sum(len(one.tokens) for one in completions)
                children += tree.expand(leaf, [tuple(one.tokens.tolist()) for one in completions])
            prompts = [s.start.prompt_tokens for s, leaf in chosen for _ in leaf.children]
            reads = [(prompt, child.tokens) for prompt, child in zip(prompts, children, strict=True)]
            for child, logits in zip(children, valuer(reads), strict=True):
                child.value, child.is_whole = float(chance(logits[-1:])[0]), writer.is_whole(child.tokens)
            for _, leaf in chosen:
                tree.back_up(leaf, tree.average(leaf))
        for s in going:
            for budget in settings.budgets[len(s.found) :]:
                if s.drawn >= budget or id(s) in stuck:
                    s.found.append((s.drawn, list(tree.wholes(s.root))))
        going = [s for s in going if len(s.found) < len(settings.budgets)]
        turn += 1


def tree_candidates(searches: Sequence[Search], writer: Writer, pool: RewardPool) -> list[list[list[rerank.Candidate]]]:
    """The whole completions of each problem at each budget [problem, budget], graded."""
    leaves = [leaf for s in searches for leaf in s.found[-1][1]]
    owners = [s for s in searches for _ in s.found[-1][1]]
    starts = [s.start.after(leaf.tokens) for s, leaf in zip(owners, leaves, strict=True)]
    made = {}
    for leaf, graded in zip(leaves, grade(pool, writer, starts), strict=True):
        scores = np.array([node.value for node in leaf.path()])
        is_right = graded.rewards[MEASURE] > 0.5
        made[id(leaf)] = rerank.Candidate(graded.answer, is_right, len(leaf.tokens), 0.0, scores)
    return [[[made[id(leaf)] for leaf in leaves] for _, leaves in s.found] for s in searches]


def within(candidates: Sequence[rerank.Candidate], tokens: int) -> list[rerank.Candidate]:
    """The first samples that take no more than so many tokens together, and at least one."""
    used = np.cumsum([c.tokens for c in candidates])
    return list(candidates[: max(1, int(np.searchsorted(used, tokens, "right")))])


def compare(
    sampled: Sequence[Sequence[rerank.Candidate]],
    searched: Sequence[Sequence[Sequence[rerank.Candidate]]],
    drawn: Sequence[Sequence[int]],
) -> dict[str, list[float]]:
    """How often each way is right at each budget, by plain sampling and by search with as many tokens.

    Args:
        drawn: tokens that the search of a problem had drawn at each budget.
    """
    out: dict[str, list[float]] = {}
    budgets = range(len(drawn[0]))
    plain = [[within(c, tokens) for tokens in row] for c, row in zip(sampled, drawn, strict=True)]
    ways = rerank.methods()
    for kind, found in (("sampling", plain), ("search", searched)):
        for name in SHOWN:
            right = [[ways[name](row[b]) if row[b] else 0.0 for row in found] for b in budgets]
            out[f"{kind}, {name}"] = [float(np.mean(one)) for one in right]
    for kind, found in (("sampling", plain), ("search", searched)):
        out[f"{kind}, whole completions"] = [float(np.mean([len(row[b]) for row in found])) for b in budgets]
    out["tokens drawn"] = [float(np.mean([row[b] for row in drawn])) for b in budgets]
    return out


def as_text(heading: str, budgets: Sequence[int], rows: dict[str, list[float]]) -> str:
    """The table for people: shares in percent, counts as they are."""
    shares = {name: row for name, row in rows.items() if name.split(", ")[-1] in SHOWN}
    counts = {name: row for name, row in rows.items() if name not in shares}
    width = max(map(len, [heading, *rows]))
    lines = [f"{name:{width}}" + "".join(f"{value:8.1f}" for value in row) for name, row in counts.items()]
    return rerank.as_text(heading.ljust(width), budgets, shares) + "\n".join(lines) + "\n"


def stage(run: Run, config: Config, policy: Policy) -> Policy:
    """Teaches the value model, searches, compares; leaves WORKDIR/STAGE.txt and STAGE.json, and the policy as it is."""
    settings = MctsConfig(**{**config["mcts"], "budgets": tuple(config["mcts"]["budgets"])})
    rows = gather(run, config, policy)
    n_valid = max(1, len(rows) // 8)
    learned, valid = rows[:-n_valid], rows[-n_valid:]

    def targets(some: Sequence[dict[str, Any]]) -> list[np.ndarray]:
        return [np.full(len(row["tokens"]), float(row["right"]), np.float32) for row in some]

    def reads(some: Sequence[dict[str, Any]]) -> list[values.Read]:
        return [(row["prompt"], row["tokens"]) for row in some]

    this = dataclasses.replace(run, stage=f"{run.stage}_model")
    valuer = values.teach(this, config, policy, reads(learned), targets(learned))
    predicted, truth = chance(np.concatenate(valuer(reads(valid)))), np.concatenate(targets(valid))
    explained = float(1 - ((predicted - truth) ** 2).mean() / max(truth.var(), 1e-9))

    groups = sample_held_out(run, config, policy)
    sampled = candidates_of(valuer, policy, groups)
    writer = open_writer(run, config, policy, config["eval"]["temperature"])
    first = [Start(group[0].example, group[0].prompt, group[0].prompt_tokens) for group in groups]
    searches = [Search(one, tree.Node((), 1.0, 0.0, False)) for one in first]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(run.seed), EVALUATION), 1)
    try:
        grow(searches, writer, valuer, settings, key)
    except Interrupted as stopped:
        raise Stopped from stopped
    with open_pool(config) as pool:
        searched = tree_candidates(searches, writer, pool)
    found = compare(sampled, searched, [[drawn for drawn, _ in s.found] for s in searches])
    text = (
        f"the value model has read {len(learned)} completions and explains {explained:.1%} of the variance of how "
        f"{len(valid)} others end\n\n"
        + as_text(f"right, of {len(groups)} problems, tokens a problem:", settings.budgets, found)
    )
    report(run, text, {"explained": explained, "budgets": list(settings.budgets), "found": found})
    hosts.say(text.rstrip())
    return policy
