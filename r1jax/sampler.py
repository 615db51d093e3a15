"""The sampler in JetStream's verbs: prefill a prompt once, insert it into the slots of its group, generate on device.

A slot holds one completion. `generate` draws many tokens per dispatch and comes back early when enough slots are free to be
filled again, so a long completion does not hold up the rest. Cache and batch shrink and grow in a few sizes, so cost follows
the tokens that exist, not the longest that may be.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from r1jax import hosts, sharding
from r1jax.draw import DrawConfig, draw, sample_keys, uniforms
from r1jax.model import transformer
from r1jax.model.config import ModelConfig
from r1jax.types import Completion, Params, Request


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """Sizes of the sampler; none of them changes what is drawn."""

    slots: int = 512
    tokens_per_dispatch: int = 64
    cache_bucket: int = 64  # the smallest cache length; the next ones are each half as long again
    prefill_prompts: int = 32  # prompts computed at once
    refill_share: float = 0.125  # share of free slots at which generate comes back to be refilled

    def __post_init__(self) -> None:
        for key in ("slots", "tokens_per_dispatch", "cache_bucket", "prefill_prompts"):
            if getattr(self, key) < 1:
                raise ValueError(f"config.sampler.{key} is {getattr(self, key)}, wanted 1 or more")
        if not 0 < self.refill_share <= 1:
            raise ValueError(f"config.sampler.refill_share is {self.refill_share}, wanted above 0 and at most 1")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """The state of all slots on device."""

    cache: dict
    token: Int[Array, "B"]  # the newest token, not yet in the cache
    position: Int[Array, "B"]  # where it will stand: the number of cached tokens
    drawn: Int[Array, "B"]  # completion tokens so far
    limit: Int[Array, "B"]  # completion tokens allowed
    is_free: Bool[Array, "B"]
    keys: UInt32[Array, "B 2"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """Prompts read once: their cache entries [L, P, ...], last logits [P, V], lengths [P], experts [L, P, T, K]."""

    cache: dict
    logits: Float[Array, "P V"]
    lengths: Int[Array, "P"]
    experts: Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """Tokens of one dispatch, [steps, B]; `is_new` where a live slot drew one; experts [steps, L, B, K] read for it."""

    tokens: Int[Array, "steps B"]
    logp: Float[Array, "steps B"]
    is_new: Bool[Array, "steps B"]
    experts: Array | None


def buckets(smallest: int, longest: int) -> list[int]:
    """Cache lengths in use: each half as long again as the one before, in multiples of 16, up to `longest`."""
    sizes = [smallest]
    while sizes[-1] < longest:
        sizes.append(-(-max(sizes[-1] * 3 // 2, sizes[-1] + 16) // 16) * 16)
    return sizes


class Sampler:
    """Device functions for one policy architecture and one way of drawing, and the loop that keeps the slots full."""

    def __init__(
        self,
        model: ModelConfig,
        config: SamplerConfig,
        drawing: DrawConfig,
        layout: sharding.Layout,
        stop_ids: Sequence[int],
        cache_dtype: jnp.dtype = jnp.float32,
    ) -> None:
        rows = layout.size("rows")
        for key in ("slots", "prefill_prompts"):
            if getattr(config, key) % rows:
                raise ValueError(
                    f"config.sampler.{key} ({getattr(config, key)}) must be a multiple of the {rows} devices of "
                    "config.mesh.data x fsdp x expert"
                )
        self.model, self.config, self.drawing, self.layout = model, config, drawing, layout
        self.cache_dtype = cache_dtype
        self.stop_ids = frozenset(stop_ids)
        self._stop_ids = jnp.asarray(sorted(stop_ids), jnp.int32)
        self._length_axis = transformer.ATTENTION[model.attention].LENGTH_AXIS
        self.prefill = jax.jit(self._prefill)
        self.insert = jax.jit(self._insert, donate_argnums=0)
        self.generate = jax.jit(self._generate, donate_argnums=1)
        self.resize = jax.jit(self._resize, static_argnums=2)
        self.empty = jax.jit(self._empty, static_argnums=(0, 1))

    # ---- device verbs -------------------------------------------------------------------------------------------

    def _lay(self, slots: Slots) -> Slots:
        """States how slots lie on the mesh."""
        axes = transformer.ATTENTION[self.model.attention].CACHE_AXES
        cache = {
            stack: {name: sharding.constrain(a, *axes[name]) for name, a in entries.items()}
            for stack, entries in slots.cache.items()
        }
        rest = {
            f.name: sharding.constrain(v, "rows", *(None,) * (v.ndim - 1))
            for f in dataclasses.fields(slots)
            if f.name != "cache"
            for v in [getattr(slots, f.name)]
        }
        return Slots(cache=cache, **rest)

    def _empty(self, slots: int, length: int) -> Slots:
        def zeros() -> Array:
            return jnp.zeros(slots, jnp.int32)

        with sharding.use(self.layout):
            return self._lay(
                Slots(
                    cache=transformer.empty_cache(self.model, slots, length, self.cache_dtype),
                    token=zeros(),
                    position=zeros(),
                    drawn=zeros(),
                    limit=zeros(),
                    is_free=jnp.ones(slots, bool),
                    keys=jnp.zeros((slots, 2), jnp.uint32),
                )
            )

    def _prefill(self, params: Params, tokens: Int[Array, "P T"], lengths: Int[Array, "P"]) -> Prefix:
        """Reads prompts, padded on the right."""
        with sharding.use(self.layout):
            segments = (jnp.arange(tokens.shape[1]) < lengths[:, None]).astype(jnp.int32)
            out = transformer.hidden(params, self.model, tokens, segments=segments, keep=("cache", "experts"))
            last = jnp.take_along_axis(out.x, (lengths - 1)[:, None, None], axis=1)[:, 0]
            cache = jax.tree.map(lambda a: a.astype(self.cache_dtype), out.cache)
            return Prefix(cache, transformer.logits(params, last), lengths, out.experts)

    def _insert(
        self,
        slots: Slots,
        prefix: Prefix,
        place: Int[Array, "n"],
        source: Int[Array, "n"],
        prompts: Int[Array, "n"],
        members: Int[Array, "n"],
        limits: Int[Array, "n"],
        rollout_key: Array,
    ) -> tuple[Slots, Drawn]:
        """Copies prefix `source[i]` into slot `place[i]` (past the last slot: nowhere) and draws its first token."""
        with sharding.use(self.layout):
            keys = sample_keys(rollout_key, prompts, members)
            token, logp = draw(prefix.logits[source], uniforms(keys, jnp.zeros_like(source)), self.drawing)

            def put(cache: Array, new: Array) -> Array:
                index = (slice(None), place) + (slice(None),) * (self._length_axis - 2)
                return cache.at[(*index, slice(0, new.shape[self._length_axis]))].set(new[:, source], mode="drop")

            def put_row(old: Array, new: Array) -> Array:
                return old.at[place].set(new, mode="drop")

            slots = Slots(
                cache=jax.tree.map(put, slots.cache, prefix.cache),
                token=put_row(slots.token, token),
                position=put_row(slots.position, prefix.lengths[source]),
                drawn=put_row(slots.drawn, jnp.ones_like(source)),
                limit=put_row(slots.limit, limits),
                is_free=put_row(slots.is_free, jnp.isin(token, self._stop_ids) | (limits <= 1)),
                keys=put_row(slots.keys, keys),
            )
            return self._lay(slots), Drawn(token[None], logp[None], jnp.ones((1, len(token)), bool), None)

    def _generate(
        self, params: Params, slots: Slots, cancel: Bool[Array, "B"], steps: Int[Array, ""], enough: Int[Array, ""]
    ) -> tuple[Slots, Drawn]:
        """Draws up to `steps` tokens per slot; ends early when `enough` slots or fewer are still live."""
        with sharding.use(self.layout):
            b, most = slots.token.shape[0], self.config.tokens_per_dispatch
            routed = (most, self.model.n_moe, b, self.model.num_experts_per_tok) if self.model.n_moe else None
            drawn = Drawn(
                tokens=jnp.zeros((most, b), jnp.int32),
                logp=jnp.zeros((most, b), jnp.float32),
                is_new=jnp.zeros((most, b), bool),
                experts=jnp.zeros(routed, jnp.int16) if routed else None,
            )

            def more(carry: tuple) -> Array:
                step, slots, _ = carry
                return (step < steps) & (jnp.sum(~slots.is_free) > enough)

            def body(carry: tuple) -> tuple:
                step, s, out = carry
                x, cache, experts = transformer.decode_step(params, self.model, s.token, s.cache, s.position)
                token, logp = draw(transformer.logits(params, x), uniforms(s.keys, s.drawn), self.drawing)
                live = ~s.is_free
                out = Drawn(
                    tokens=out.tokens.at[step].set(token),
                    logp=out.logp.at[step].set(logp),
                    is_new=out.is_new.at[step].set(live),
                    experts=None if experts is None else out.experts.at[step].set(experts.astype(jnp.int16)),
                )
                ended = jnp.isin(token, self._stop_ids) | (s.drawn + 1 >= s.limit)
                s = Slots(
                    cache=cache,
                    token=jnp.where(live, token, s.token),
                    position=s.position + live,
                    drawn=s.drawn + live,
                    limit=s.limit,
                    is_free=s.is_free | ended,
                    keys=s.keys,
                )
                return step + 1, self._lay(s), out

            start = dataclasses.replace(slots, is_free=slots.is_free | cancel)
            _, slots, drawn = jax.lax.while_loop(more, body, (jnp.int32(0), self._lay(start), drawn))
            return slots, drawn

    def _resize(self, slots: Slots, keep: Int[Array, "B"], length: int) -> Slots:
        """The slots numbered in `keep` (-1: a free one), with another cache length."""
        with sharding.use(self.layout):

            def cut(a: Array) -> Array:
                a = a[:, jnp.maximum(keep, 0)]
                change = length - a.shape[self._length_axis]
                pad = [(0, max(change, 0) if axis == self._length_axis else 0) for axis in range(a.ndim)]
                return jax.lax.slice_in_dim(jnp.pad(a, pad), 0, length, axis=self._length_axis)

            rest = {
                f.name: getattr(slots, f.name)[jnp.maximum(keep, 0)]
                for f in dataclasses.fields(slots)
                if f.name != "cache"
            }
            rest["is_free"] = rest["is_free"] | (keep < 0)
            return self._lay(Slots(cache=jax.tree.map(cut, slots.cache), **rest))

    # ---- the loop that keeps the slots full ---------------------------------------------------------------------

    def run(
        self,
        params: Params,
        requests: Sequence[Request],
        rollout_key: Array,
        max_completion_tokens: int,
        is_stopped: Callable[[list[int]], int | None] = lambda tokens: None,
    ) -> Iterator[Completion]:
        """Samples all requests and yields completions as they finish.

        Args:
            params: weights in the decode layout.
            requests: those of one prompt stand side by side, so that its prefix is computed once.
            rollout_key: of this run and rollout.
            is_stopped: given a completion's tokens, how many of them to keep if a stop text has come up, else None.
        """
        return _Loop(self, params, requests, rollout_key, max_completion_tokens, is_stopped).run()


class _Loop:
    """One call of `Sampler.run`: which request is in which slot, and what it has drawn so far."""

    def __init__(
        self,
        sampler: Sampler,
        params: Params,
        requests: Sequence[Request],
        rollout_key: Array,
        max_completion_tokens: int,
        is_stopped: Callable[[list[int]], int | None],
    ) -> None:
        config = sampler.config
        self.sampler, self.params, self.key, self.is_stopped = sampler, params, rollout_key, is_stopped
        self.limit, self.pending = max_completion_tokens, list(reversed(requests))
        longest = max(len(r.tokens) for r in requests)
        # Prompts are padded to one length per call: each other length would be another program.
        self.prompt_length = -(-longest // 16) * 16
        self.lengths = buckets(max(config.cache_bucket, self.prompt_length + 16), longest + max_completion_tokens)
        self.sizes = self._batch_sizes(config.slots, sampler.layout.size("rows"))
        size = next(n for n in reversed(self.sizes) if n >= min(len(requests), config.slots))
        self.slots = sampler.empty(size, self.lengths[0])
        self.held: list[Completion | None] = [None] * size
        self.tokens: list[list[int]] = [[] for _ in range(size)]
        self.logp: list[list[float]] = [[] for _ in range(size)]
        self.experts: list[list[np.ndarray]] = [[] for _ in range(size)]
        self.prompt_tokens = [0] * size
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

    def _fill(self, free: list[int]) -> Iterator[Completion]:
        taken = [self.pending.pop() for _ in range(min(len(free), len(self.pending)))]
        self._read_prompts(taken)
        # One dispatch per prefill batch; arrays are padded to the batch size so that there is one program.
        size, n_rows = len(self.held), self.sampler.config.prefill_prompts
        batches: dict[int, list[tuple[int, Request]]] = {}
        for slot, request in zip(free, taken, strict=False):
            batches.setdefault(id(self.prefixes[request.prompt][0]), []).append((slot, request))
        for pairs in batches.values():
            prefix = self.prefixes[pairs[0][1].prompt][0]
            columns = np.zeros((5, size), np.int32)
            columns[0] = size
            for i, (slot, r) in enumerate(pairs):
                columns[:, i] = slot, self.prefixes[r.prompt][1], r.prompt, r.member, self.limit
            assert columns[1].max() < n_rows
            self.slots, drawn = self.sampler.insert(self.slots, prefix, *map(jnp.asarray, columns), self.key)
            tokens, logp = hosts.fetch(drawn.tokens)[0], hosts.fetch(drawn.logp)[0]
            for i, (slot, r) in enumerate(pairs):
                self.held[slot] = Completion(r.prompt, r.member, np.zeros(0, np.int32), np.zeros(0, np.float32), "")
                read = self.prefixes[r.prompt][2]
                self.tokens[slot], self.logp[slot] = [int(tokens[i])], [float(logp[i])]
                self.experts[slot] = [] if read is None else [read[: len(r.tokens)]]
                self.prompt_tokens[slot] = len(r.tokens)
                self.cancel[slot] = False
                if (completion := self._finished(slot)) is not None:
                    yield completion
        # A prefix is kept only while members of its group still wait.
        waiting = {r.prompt for r in self.pending}
        self.prefixes = {prompt: entry for prompt, entry in self.prefixes.items() if prompt in waiting}

    def _read_prompts(self, requests: list[Request]) -> None:
        new = {r.prompt: r.tokens for r in requests if r.prompt not in self.prefixes}
        n_rows = self.sampler.config.prefill_prompts
        for r in reversed(self.pending):
            # A program for a fixed number of prompts: what is free in it goes to those that come next.
            if len(new) % n_rows == 0:
                break
            if r.prompt not in self.prefixes:
                new[r.prompt] = r.tokens
        names = list(new)
        for start in range(0, len(names), n_rows):
            batch = names[start : start + n_rows]
            tokens = np.zeros((n_rows, self.prompt_length), np.int32)
            lengths = np.ones(n_rows, np.int32)
            for row, name in enumerate(batch):
                tokens[row, : len(new[name])], lengths[row] = new[name], len(new[name])
            prefix = self.sampler.prefill(self.params, jnp.asarray(tokens), jnp.asarray(lengths))
            read = None
            if prefix.experts is not None:
                read = hosts.fetch(prefix.experts).astype(np.int16).transpose(1, 2, 0, 3)
            for row, name in enumerate(batch):
                self.prefixes[name] = prefix, row, None if read is None else read[row]

    def _fit(self, live: list[int]) -> None:
        """Chooses batch size and cache length for what is live now."""
        need = max(self.prompt_tokens[i] + len(self.tokens[i]) for i in live) + 1
        have = self.slots.cache[next(iter(self.slots.cache))]
        have = next(iter(have.values())).shape[self.sampler._length_axis]
        length = have if need <= have else next(n for n in self.lengths if n >= need)
        fits = next(n for n in self.lengths if n >= min(need + self.sampler.config.tokens_per_dispatch, self.lengths[-1]))
        if fits < have:
            length = fits
        size = len(self.held)
        if not self.pending:
            size = min(size, next(n for n in reversed(self.sizes) if n >= len(live)))
        if (size, length) == (len(self.held), have):
            return
        keep = (live + [-1] * size)[:size] if size < len(self.held) else list(range(size))
        self.slots = self.sampler.resize(self.slots, jnp.asarray(keep, jnp.int32), length)
        if size < len(self.held):
            for name in ("held", "tokens", "logp", "experts", "prompt_tokens"):
                old, empty = getattr(self, name), {"held": None, "prompt_tokens": 0}
                setattr(self, name, [old[i] if i >= 0 else empty.get(name, []) for i in keep])
            self.cancel = np.array([self.cancel[i] if i >= 0 else False for i in keep])

    def _generate(self) -> Iterator[Completion]:
        config, size = self.sampler.config, len(self.held)
        live = [i for i, held in enumerate(self.held) if held is not None]
        have = next(iter(next(iter(self.slots.cache.values())).values())).shape[self.sampler._length_axis]
        room = have - max(self.prompt_tokens[i] + len(self.tokens[i]) for i in live) + 1
        steps = min(config.tokens_per_dispatch, room)
        smaller = max((n for n in self.sizes if n < size), default=0)
        enough = int(size * (1 - config.refill_share)) if self.pending else smaller
        if len(live) <= enough:
            enough = 0
        self.slots, drawn = self.sampler.generate(
            self.params, self.slots, jnp.asarray(self.cancel), jnp.int32(steps), jnp.int32(enough)
        )
        self.cancel[:] = False
        tokens, logp, is_new = (hosts.fetch(a) for a in (drawn.tokens, drawn.logp, drawn.is_new))
        experts = None if drawn.experts is None else hosts.fetch(drawn.experts)
        counts = is_new.sum(0)
        for slot in live:
            n = int(counts[slot])
            self.tokens[slot] += tokens[:n, slot].tolist()
            self.logp[slot] += logp[:n, slot].tolist()
            if experts is not None:
                self.experts[slot].append(experts[:n, :, slot])
            if (completion := self._finished(slot)) is not None:
                yield completion

    def _finished(self, slot: int) -> Completion | None:
        tokens, held = self.tokens[slot], self.held[slot]
        cut = self.is_stopped(tokens)
        if cut is None and tokens[-1] in self._stops:
            cut = len(tokens)
        if cut is None and len(tokens) < self.limit:
            return None
        self.cancel[slot] = True
        self.held[slot] = None
        n = len(tokens) if cut is None else cut
        experts = np.concatenate(self.experts[slot])[: self.prompt_tokens[slot] + n - 1] if self.experts[slot] else None
        return dataclasses.replace(
            held,
            tokens=np.asarray(tokens[:n], np.int32),
            logp=np.asarray(self.logp[slot][:n], np.float32),
            stop="length" if cut is None else "stop",
            experts=experts,
        )

    @property
    def _stops(self) -> set[int]:
        return self.sampler.stop_ids
