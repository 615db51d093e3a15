"""The sampler: the loop that keeps the slots full (slots.py has the device side).

A finished slot is filled again at once, so a long completion does not hold up the rest. Cache and batch shrink and grow
in a few sizes, so cost follows the tokens that exist, not the longest that may be. The idea is JetStream's and Orca's
(continuous batching, Yu et al., OSDI 2022).
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from r1jax import hosts
from r1jax.slots import Prefix, Verbs
from r1jax.types import Completion, Params, Request


class Interrupted(Exception):
    """The run was asked to stop while it sampled."""


def sample(
    verbs: Verbs,
    params: Params,
    requests: Sequence[Request],
    rollout_key: jax.Array,
    max_completion_tokens: int,
    is_stopped: Callable[[list[int]], int | None] = lambda tokens: None,
    prompt_tokens: int = 0,
    is_interrupted: Callable[[], bool] = lambda: False,
    with_experts: bool = False,
) -> Iterator[Completion]:
    """Samples all requests and yields completions as they finish.

    Args:
        params: weights in the decode layout.
        requests: those of one prompt stand side by side, so that its prefix is computed once.
        rollout_key: of this run and rollout.
        is_stopped: given a completion's tokens, how many of them to keep if a stop text has come up, else None.
        prompt_tokens: what prompts are padded to if none is longer; a call with prompts of another length is another
            program.
        is_interrupted: asked before each dispatch, which all hosts run alike.
        with_experts: whether completions name the experts that were chosen, a kilobyte per token of DeepSeek-V3's.

    Raises:
        Interrupted: `is_interrupted` said so; what was drawn is lost.
    """
    return _Loop(
        verbs, params, requests, rollout_key, max_completion_tokens, is_stopped, prompt_tokens, is_interrupted,
        with_experts,
    ).run()  # fmt: skip


def buckets(smallest: int, longest: int) -> list[int]:
    """Cache lengths in use: each half as long again as the one before, in multiples of 16, up to `longest`."""
    sizes = [smallest]
    while sizes[-1] < longest:
        sizes.append(-(-max(sizes[-1] * 3 // 2, sizes[-1] + 16) // 16) * 16)
    return sizes


class _Loop:
    """One call of `sample`: which request is in which slot, and what it has drawn so far."""

    def __init__(
        self,
        verbs: Verbs,
        params: Params,
        requests: Sequence[Request],
        rollout_key: jax.Array,
        max_completion_tokens: int,
        is_stopped: Callable[[list[int]], int | None],
        prompt_tokens: int,
        is_interrupted: Callable[[], bool],
        with_experts: bool,
    ) -> None:
        config = verbs.config
        self.verbs, self.params, self.key, self.is_stopped = verbs, params, rollout_key, is_stopped
        self.is_interrupted, self.with_experts = is_interrupted, with_experts
        self.limit, self.pending = max_completion_tokens, list(reversed(requests))
        longest = max(prompt_tokens, *(len(r.tokens) for r in requests))
        # Prompts are padded to one length per call: each other length would be another program.
        self.prompt_length = -(-longest // 16) * 16
        self.lengths = buckets(max(config.cache_bucket, self.prompt_length + 16), longest + max_completion_tokens)
        self.sizes = self._batch_sizes(config.slots, verbs.layout.size("slots"))
        size = next(n for n in reversed(self.sizes) if n >= min(len(requests), config.slots))
        self.slots = verbs.empty(size, self.lengths[0])
        self.held: list[Completion | None] = [None] * size
        self.tokens: list[list[int]] = [[] for _ in range(size)]
        self.logp: list[list[float]] = [[] for _ in range(size)]
        self.experts: list[list[np.ndarray]] = [[] for _ in range(size)]
        self.prompt_tokens, self.limits = [0] * size, [0] * size
        self.cancel = np.zeros(size, bool)
        self.prefixes: dict[int, tuple[Prefix, int, np.ndarray | None]] = {}

    @staticmethod
    def _batch_sizes(slots: int, rows: int) -> list[int]:
        """Batch sizes in use, largest first: quarters, as long as they divide over the devices."""
        sizes = [slots]
        while sizes[-1] % 4 == 0 and sizes[-1] // 4 >= 16 and sizes[-1] // 4 % rows == 0:
            sizes.append(sizes[-1] // 4)
        return sizes

    def run(self) -> Iterator[Completion]:
        while True:
            self._heed()
            free = [i for i, held in enumerate(self.held) if held is None]
            if self.pending and free:
                yield from self._fill(free)
            live = [i for i, held in enumerate(self.held) if held is not None]
            if not live:
                if not self.pending:
                    return
                continue
            self._fit(live)
            yield from self._generate()

    def _heed(self) -> None:
        if self.is_interrupted():
            raise Interrupted

    def _fill(self, free: list[int]) -> Iterator[Completion]:
        taken = [self.pending.pop() for _ in range(min(len(free), len(self.pending)))]
        self._read_prompts(taken)
        # One dispatch per prefill batch.
        size, n_rows = len(self.held), self.verbs.config.prefill_prompts
        batches: dict[int, list[tuple[int, Request]]] = {}
        for slot, request in zip(free, taken, strict=False):
            batches.setdefault(id(self.prefixes[request.prompt][0]), []).append((slot, request))
        for pairs in batches.values():
            prefix = self.prefixes[pairs[0][1].prompt][0]
            columns = np.zeros((4, size), np.int32)
            columns[0] = -1
            for slot, r in pairs:
                columns[:, slot] = self.prefixes[r.prompt][1], r.prompt, r.member, self._limit(r)
            assert columns[0].max() < n_rows
            self.slots, drawn = self.verbs.insert(self.slots, prefix, *map(jnp.asarray, columns), self.key)
            tokens, logp = hosts.fetch(drawn.tokens)[0], hosts.fetch(drawn.logp)[0]
            for slot, r in pairs:
                self.held[slot] = Completion(r.prompt, r.member, np.zeros(0, np.int32), np.zeros(0, np.float32), "")
                read = self.prefixes[r.prompt][2]
                self.tokens[slot], self.logp[slot] = [int(tokens[slot])], [float(logp[slot])]
                self.experts[slot] = [] if read is None else [read]
                self.prompt_tokens[slot], self.limits[slot] = len(r.tokens), self._limit(r)
                self.cancel[slot] = False
                if (completion := self._finished(slot)) is not None:
                    yield completion
        # A prefix is kept only while members of its group still wait.
        waiting = {r.prompt for r in self.pending}
        self.prefixes = {prompt: entry for prompt, entry in self.prefixes.items() if prompt in waiting}

    def _read_prompts(self, requests: list[Request]) -> None:
        new = {r.prompt: r.tokens for r in requests if r.prompt not in self.prefixes}
        n_rows = self.verbs.config.prefill_prompts
        for r in reversed(self.pending):
            # A program for a fixed number of prompts: what is free in it goes to those that come next.
            if len(new) % n_rows == 0:
                break
            if r.prompt not in self.prefixes:
                new[r.prompt] = r.tokens
        names = list(new)
        for start in range(0, len(names), n_rows):
            self._heed()
            batch = names[start : start + n_rows]
            tokens = np.zeros((n_rows, self.prompt_length), np.int32)
            lengths = np.ones(n_rows, np.int32)
            for row, name in enumerate(batch):
                tokens[row, : len(new[name])], lengths[row] = new[name], len(new[name])
            prefix = self.verbs.prefill(self.params, jnp.asarray(tokens), jnp.asarray(lengths))
            read = None
            if self.with_experts and prefix.experts is not None:
                read = hosts.fetch(prefix.experts).astype(np.int16).transpose(1, 2, 0, 3)
            for row, name in enumerate(batch):
                # A copy: a view would keep what was read of all these prompts, as far as they are padded.
                mine = None if read is None else read[row, : lengths[row]].copy()
                self.prefixes[name] = prefix, row, mine

    def _cache_length(self) -> int:
        return jax.tree.leaves(self.slots.cache)[0].shape[self.verbs.length_axis]

    def _fit(self, live: list[int]) -> None:
        """Chooses batch size and cache length for what is live now."""
        need = max(self.prompt_tokens[i] + len(self.tokens[i]) for i in live) + 1
        have = self._cache_length()
        length = have if need <= have else next(n for n in self.lengths if n >= need)
        fits = next(n for n in self.lengths if n >= min(need + self.verbs.config.tokens_per_dispatch, self.lengths[-1]))
        if fits < have:
            length = fits
        keep = None if self.pending else self._fewer(live)
        if keep is None and length == have:
            return
        self.slots = self.verbs.resize(self.slots, None if keep is None else jnp.asarray(keep, jnp.int32), length)
        if keep is not None:
            each = len(self.held) // len(keep)
            kept = [device * each + i if i >= 0 else -1 for device, mine in enumerate(keep) for i in mine]
            for name, empty in (
                ("held", None),
                ("tokens", []),
                ("logp", []),
                ("experts", []),
                ("prompt_tokens", 0),
                ("limits", 0),
            ):
                old = getattr(self, name)
                setattr(self, name, [old[i] if i >= 0 else empty for i in kept])
            self.cancel = np.array([self.cancel[i] if i >= 0 else False for i in kept])

    def _fewer(self, live: list[int]) -> list[list[int]] | None:
        """Which slots each device keeps of its own in the smallest batch that has room for them, -1 where it has more.

        None where that is the batch at hand.
        """
        devices, size = self.verbs.layout.size("slots"), len(self.held)
        each = size // devices
        by_device = [[i % each for i in live if i // each == device] for device in range(devices)]
        fullest = max(map(len, by_device))
        smaller = next((n for n in reversed(self.sizes) if n < size and n // devices >= fullest), None)
        return smaller and [(mine + [-1] * smaller)[: smaller // devices] for mine in by_device]

    def _generate(self) -> Iterator[Completion]:
        config, size = self.verbs.config, len(self.held)
        live = [i for i, held in enumerate(self.held) if held is not None]
        room = self._cache_length() - max(self.prompt_tokens[i] + len(self.tokens[i]) for i in live) + 1
        steps = min(config.tokens_per_dispatch, room)
        smaller = max((n for n in self.sizes if n < size), default=0)
        enough = int(size * (1 - config.refill_share)) if self.pending else smaller
        if len(live) <= enough:
            enough = 0
        self.slots, drawn = self.verbs.generate(
            self.params, self.slots, jnp.asarray(self.cancel), jnp.int32(steps), jnp.int32(enough)
        )
        self.cancel[:] = False
        tokens, logp, is_new = (hosts.fetch(a) for a in (drawn.tokens, drawn.logp, drawn.is_new))
        experts = hosts.fetch(drawn.experts) if self.with_experts and drawn.experts is not None else None
        counts = is_new.sum(0)
        assert counts[live].all(), "a dispatch draws at least one token for every live slot, or this would never end"
        for slot in live:
            n = int(counts[slot])
            self.tokens[slot] += tokens[:n, slot].tolist()
            self.logp[slot] += logp[:n, slot].tolist()
            if experts is not None:
                # A copy: a view would keep what all slots drew, as long as this one lives.
                self.experts[slot].append(experts[:n, :, slot].copy())
            if (completion := self._finished(slot)) is not None:
                yield completion

    def _finished(self, slot: int) -> Completion | None:
        tokens, held = self.tokens[slot], self.held[slot]
        cut = self.is_stopped(tokens)
        if cut is None and tokens[-1] in self.verbs.stop_ids:
            cut = len(tokens)
        if cut is None and len(tokens) < self.limits[slot]:
            return None
        self.cancel[slot] = True
        self.held[slot] = None
        n = len(tokens) if cut is None else cut
        experts = np.concatenate(self.experts[slot])[: self.prompt_tokens[slot] + n - 1] if self.experts[slot] else None
        self.experts[slot] = []
        return dataclasses.replace(
            held,
            tokens=np.asarray(tokens[:n], np.int32),
            logp=np.asarray(self.logp[slot][:n], np.float32),
            stop="length" if cut is None else "stop",
            experts=experts,
        )

    def _limit(self, request: Request) -> int:
        return min(request.max_tokens or self.limit, self.limit)
