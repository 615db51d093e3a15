"""Prompts to a graded batch: sampling and grading at the same time.

Completions go to the grading processes as they finish, while other slots still decode; what is trained on later are the
very ids that were sampled, never text encoded again.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from r1jax import hosts
from r1jax.rewards.pool import Graded, RewardPool
from r1jax.sampler import sample as sample_requests
from r1jax.slots import Verbs
from r1jax.text import Tokenizer, encode_prompt, forced
from r1jax.types import Completion, Example, Params, Request


@dataclasses.dataclass(frozen=True)
class Sample:
    """One completion of one prompt with its grade."""

    example: Example
    prompt: str
    prompt_tokens: tuple[int, ...]
    completion: Completion
    text: str
    graded: Graded


Group = list[Sample]


def encode_prompts(
    examples: Sequence[Example], template: str, tokenizer: Tokenizer, max_prompt_tokens: int, opening: str = ""
) -> list[tuple[str, tuple[int, ...]]]:
    """Text and ids of each prompt; with the ids of what every completion is made to begin with.

    Raises:
        ValueError: a prompt longer than `max_prompt_tokens` (config.data.max_prompt_tokens).
    """
    out = []
    for example in examples:
        prompt, ids = encode_prompt(tokenizer, template, example["question"], opening)
        if not 0 < len(ids) <= max_prompt_tokens:
            raise ValueError(
                f"the prompt of {example['id']!r} has {len(ids)} tokens, wanted 1 to {max_prompt_tokens}; "
                "raise config.data.max_prompt_tokens or leave it out"
            )
        out.append((prompt, tuple(ids)))
    return out


def completion_text(tokenizer: Tokenizer, completion: Completion) -> str:
    """What the policy wrote, without the end-of-sequence token."""
    ids = completion.tokens.tolist()
    return tokenizer.decode(ids[:-1] if ids and ids[-1] in tokenizer.eos_ids else ids)


def stop_text_finder(tokenizer: Tokenizer, stop_texts: Sequence[str]) -> Callable[[list[int]], int | None]:
    """A function that says how many tokens to keep once one of the texts has come up, else None."""
    # A token is at least one byte, so a stop text that has just come up lies within this many tokens of the end.
    window = max((len(text.encode()) for text in stop_texts), default=0)

    def find(tokens: list[int]) -> int | None:
        if not stop_texts or not any(text in tokenizer.decode(tokens) for text in stop_texts):
            return None
        for n in range(1, len(tokens) + 1):
            tail = tokenizer.decode(tokens[max(0, n - window - 1) : n])
            if any(text in tail for text in stop_texts):
                return n
        return None

    return find


def collect(
    verbs: Verbs,
    params: Params,
    tokenizer: Tokenizer,
    pool: RewardPool,
    examples: Sequence[Example],
    template: str,
    group_size: int,
    rollout_key: jax.Array,
    first_prompt: int,
    max_prompt_tokens: int,
    max_completion_tokens: int,
    stop_texts: Sequence[str] = (),
    is_interrupted: Callable[[], bool] = lambda: False,
    opening: str = "",
    with_experts: bool = False,
) -> list[Group]:
    """Samples `group_size` completions of each example and grades them.

    Args:
        params: in the decode layout.
        first_prompt: number of the first example in the run's order; it names its random draws.
        is_interrupted, with_experts: see `sampler.sample`.
        opening: what every completion is made to begin with; part of its text, not of its tokens.

    Returns:
        One group per example, members in order.

    Raises:
        sampler.Interrupted: the run was asked to stop. What is being graded is left in the pool, which nobody may use
            any more: waiting for it would take of the time that is given to save.
    """
    prompts = encode_prompts(examples, template, tokenizer, max_prompt_tokens, opening)
    requests = [Request(first_prompt + i, m, ids) for i, (_, ids) in enumerate(prompts) for m in range(group_size)]
    mine = frozenset(hosts.my_part(range(len(examples))))
    find_stop = stop_text_finder(tokenizer, stop_texts)
    completions: dict[int, tuple[Completion, str]] = {}
    graded: dict[int, Graded] = {}
    for completion in sample_requests(
        verbs, params, requests, rollout_key, max_completion_tokens, find_stop,
        is_interrupted=is_interrupted, with_experts=with_experts,
    ):  # fmt: skip
        i = completion.prompt - first_prompt
        ticket = i * group_size + completion.member
        text = forced(prompts[i][0], opening) + completion_text(tokenizer, completion)
        completions[ticket] = completion, text
        if i in mine:
            pool.submit(ticket, prompts[i][0], text, examples[i])
        graded.update((g.ticket, g) for g in pool.poll())
    graded.update((g.ticket, g) for g in pool.drain())
    for records in hosts.gather([dataclasses.asdict(g) for g in graded.values()]) if hosts.count() > 1 else ():
        graded.update((r["ticket"], Graded(**{**r, "flags": tuple(r["flags"])})) for r in records)

    def sample(i: int, member: int) -> Sample:
        ticket = i * group_size + member
        completion, text = completions[ticket]
        return Sample(examples[i], *prompts[i], completion, text, graded[ticket])

    return [[sample(i, m) for m in range(group_size)] for i in range(len(examples))]


def records(
    groups: Sequence[Group], tokenizer: Tokenizer, stage: str, step: int, rollout: int
) -> Iterator[dict[str, Any]]:
    """One row per completion, in full, for `metrics.write_rollout`."""
    for s in (s for group in groups for s in group):
        yield {
            "stage": stage,
            "step": step,
            "rollout": rollout,
            "prompt_id": s.example["id"],
            "member": s.completion.member,
            "level": s.example.get("level"),
            "prompt": s.prompt,
            "completion": s.text,
            "tokens": [tokenizer.decode([token]) for token in s.completion.tokens.tolist()],
            "logp": s.completion.logp,
            "rewards": s.graded.rewards,
            "reward": s.graded.reward,
            "answer": s.graded.answer,
            "gold": s.example["answer"],
            "stop": s.completion.stop,
            "flags": list(s.graded.flags),
        }


def majority(group: Group) -> str | None:
    """The commonest answer, the one that came up first among equals; None when nobody answered."""
    votes: dict[str, int] = {}
    for s in group:
        if s.graded.answer is not None:
            votes[s.graded.answer] = votes.get(s.graded.answer, 0) + 1
    return max(votes, key=votes.__getitem__) if votes else None


def majority_is_right(group: Group, measure: str) -> bool:
    """Whether the commonest answer earns `measure` (a reward of 0 or 1)."""
    answer = majority(group)
    return answer is not None and any(s.graded.answer == answer and s.graded.rewards[measure] > 0.5 for s in group)


def as_array(groups: Sequence[Group], value: Callable[[Sample], float]) -> np.ndarray:
    """A number of each sample, [N, G]."""
    return np.array([[value(s) for s in group] for group in groups], np.float64)
