"""Completions in steps: where a step ends, and how a policy goes on from a part of a completion."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from r1jax import draw, hosts
from r1jax.rewards.pool import Graded, RewardPool
from r1jax.run import Config, Policy, Run, decode_layout, make_verbs
from r1jax.sampler import sample
from r1jax.slots import Verbs
from r1jax.text import Tokenizer
from r1jax.types import Completion, Example, Params, Request

# What ends a step where a token's text has it: a sentence or a line.
MARKS = (". ", "。", "\n")
# Prefixes are padded to multiples of this: each other length would be compiled anew.
PREFIX_TOKENS = 96


def step_marks(tokenizer: Tokenizer) -> Callable[[int], bool]:
    """A function that says whether a token ends a step."""

    @functools.cache
    def ends(token: int) -> bool:
        return any(mark in tokenizer.decode([token]) for mark in MARKS)

    return ends


def step_ends(tokens: Sequence[int], ends: Callable[[int], bool]) -> list[int]:
    """Index of the last token of each step; what is left after the last mark is a step as well."""
    found = [i for i, token in enumerate(tokens) if ends(token)]
    return found if found and found[-1] == len(tokens) - 1 else [*found, len(tokens) - 1]


@dataclasses.dataclass(frozen=True)
class Start:
    """A part of a completion, maybe empty, to go on from."""

    example: Example
    prompt: str
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...] = ()

    def after(self, more: Sequence[int]) -> "Start":
        """With more tokens."""
        return dataclasses.replace(self, tokens=(*self.tokens, *map(int, more)))


@dataclasses.dataclass(frozen=True)
class Writer:
    """A policy that goes on from parts of completions.

    Attributes:
        limit: tokens of a whole completion, what was there already included.
    """

    run: Run
    tokenizer: Tokenizer
    verbs: Verbs
    weights: Params
    limit: int

    def go_on(
        self,
        starts: Sequence[Start],
        samples: int,
        key: jax.Array,
        cut: Callable[[list[int]], int | None] = lambda tokens: None,
        most: int = 0,
    ) -> list[list[Completion]]:
        """Some continuations of each start that is shorter than the limit.

        Args:
            key: of the draws; the number of a start and of its sample are folded in.
            cut: given a continuation's tokens, how many of them to keep if it is to end there, else None.
            most: tokens of a continuation, 0: up to the limit.

        Raises:
            sampler.Interrupted: the run was asked to stop.
        """
        requests = [
            Request(i, m, (*s.prompt_tokens, *s.tokens), min(most or self.limit, self.limit - len(s.tokens)))
            for i, s in enumerate(starts)
            for m in range(samples)
        ]
        longest = -(-max(len(r.tokens) for r in requests) // PREFIX_TOKENS) * PREFIX_TOKENS
        found: dict[tuple[int, int], Completion] = {}
        limit, ask = most or self.limit, self.run.is_interrupted
        for one in sample(self.verbs, self.weights, requests, key, limit, cut, longest, ask):
            found[one.prompt, one.member] = one
        return [[found[i, m] for m in range(samples)] for i in range(len(starts))]

    def text(self, tokens: Sequence[int]) -> str:
        """Without the token that ended it."""
        is_ended = len(tokens) > 0 and tokens[-1] in self.tokenizer.eos_ids
        return self.tokenizer.decode(tokens[:-1] if is_ended else tokens)

    def is_whole(self, tokens: Sequence[int]) -> bool:
        """Whether nothing can follow."""
        return len(tokens) >= self.limit or (len(tokens) > 0 and tokens[-1] in self.tokenizer.eos_ids)


def open_writer(run: Run, config: Config, policy: Policy, temperature: float) -> Writer:
    """The policy, laid out for decoding.

    Raises:
        ValueError: several hosts.
    """
    if hosts.count() > 1:
        raise ValueError(f"{run.stage}: this study runs on one host, but there are {hosts.count()}")
    layout = run.layouts["decode"]
    verbs = make_verbs(config, policy, layout, draw.DrawConfig(temperature=temperature))
    weights = decode_layout(policy, layout, config["model"]["compute_dtype"])(policy.params)
    return Writer(run, policy.tokenizer, verbs, weights, config["rl"]["max_completion_tokens"])


def grade(pool: RewardPool, writer: Writer, wholes: Sequence[Start]) -> list[Graded]:
    """What the rewards say of whole completions."""
    for ticket, one in enumerate(wholes):
        pool.submit(ticket, one.prompt, writer.text(one.tokens), one.example)
    found = {graded.ticket: graded for graded in pool.drain()}
    return [found[ticket] for ticket in range(len(wholes))]


def success_after(
    writer: Writer, pool: RewardPool, starts: Sequence[Start], samples: int, key: jax.Array, measure: str
) -> np.ndarray:
    """Share of continuations of each start that end right (Math-Shepherd, arXiv 2312.08935, soft estimation).

    A start that is whole already is right or not; nothing is sampled for it.
    """
    open_ones = [i for i, s in enumerate(starts) if not writer.is_whole(s.tokens)]
    wholes, owner = [], []
    for i, s in enumerate(starts):
        if writer.is_whole(s.tokens):
            wholes.append(s)
            owner.append(i)
    going_on = writer.go_on([starts[i] for i in open_ones], samples, key) if open_ones else []
    for i, completions in zip(open_ones, going_on, strict=True):
        wholes += [starts[i].after(one.tokens) for one in completions]
        owner += [i] * samples
    right = np.array([graded.rewards[measure] > 0.5 for graded in grade(pool, writer, wholes)])
    owners = np.array(owner)
    return np.array([right[owners == i].mean() for i in range(len(starts))])
