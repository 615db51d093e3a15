"""The sampler's device side, in JetStream's verbs: prefill a prompt once, insert it into slots, generate many tokens.

A slot holds one completion. `generate` comes back early when enough slots are free to be filled again.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt32

from r1jax import sharding
from r1jax.draw import DrawConfig, draw, sample_keys, uniforms
from r1jax.model import mla, quantize, transformer
from r1jax.model.config import DEFAULT_PATHS, ModelConfig, Paths
from r1jax.model.layers import pad_last
from r1jax.types import Params


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """Sizes of the sampler and ways to compute; none of them but `weights` changes what is drawn."""

    slots: int = 512
    tokens_per_dispatch: int = 64
    cache_bucket: int = 64  # the smallest cache length; the next ones are each half as long again
    prefill_prompts: int = 32  # prompts computed at once
    refill_share: float = 0.125  # share of free slots at which generate comes back to be refilled
    attention: str = "auto"  # how the cache is read: plain, kernel (TPU; latent attention), auto: what the device has
    weights: str = ""  # of large matrices in rollouts, a key of quantize.KINDS; empty: the compute dtype

    def __post_init__(self) -> None:
        for key in ("slots", "tokens_per_dispatch", "cache_bucket", "prefill_prompts"):
            if getattr(self, key) < 1:
                raise ValueError(f"config.sampler.{key} is {getattr(self, key)}, wanted 1 or more")
        if self.attention not in ("auto", *mla.READ):
            raise ValueError(f"config.sampler.attention is {self.attention!r}, wanted auto, {', '.join(mla.READ)}")
        if self.weights not in ("", *quantize.KINDS):
            raise ValueError(
                f"config.sampler.weights is {self.weights!r}, wanted {', '.join(quantize.KINDS)}, or empty for "
                "config.model.compute_dtype"
            )
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
    """Prompts read once: cache entries [P, ...] per layer, last logits [P, V], lengths [P], experts [L, P, T, K]."""

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


def _reading(model: ModelConfig, config: SamplerConfig, layout: sharding.Layout) -> tuple[str, int]:
    """How the cache is read, and of how many values its width is a multiple."""
    path = config.attention
    if path == "auto":
        path = "kernel" if model.attention == "mla" and layout.platform == "tpu" else "plain"
    if path == "plain":
        return path, 1
    if model.attention != "mla":
        raise ValueError(
            "config.sampler.attention is 'kernel', which reads latent caches, but this policy's attention is "
            f"{model.attention!r}: take 'auto' or 'plain'"
        )
    from r1jax.model.kernels.mla_decode import LANES

    return path, LANES


def _whole_lanes(a: Float[Array, "*n d"], lanes: int) -> Float[Array, "*n w"]:
    return pad_last(a, -(-a.shape[-1] // lanes) * lanes)


class Verbs:
    """The jitted functions for one policy architecture and one way of drawing."""

    def __init__(
        self,
        model: ModelConfig,
        config: SamplerConfig,
        drawing: DrawConfig,
        layout: sharding.Layout,
        stop_ids: Sequence[int],
        cache_dtype: DTypeLike = jnp.float32,
        paths: Paths = DEFAULT_PATHS,
    ) -> None:
        for key, axis in (("slots", "slots"), ("prefill_prompts", "rows")):
            if getattr(config, key) % (parts := layout.size(axis)):
                raise ValueError(
                    f"config.sampler.{key} ({getattr(config, key)}) must be a multiple of the {parts} devices of "
                    f"config.mesh.{' x '.join(layout.rules[axis])}"
                )
        self.model, self.config, self.drawing, self.layout = model, config, drawing, layout
        self.cache_dtype, self.paths = cache_dtype, paths
        self.path, lanes = _reading(model, config, layout)
        self._width = partial(_whole_lanes, lanes=lanes)
        self.stop_ids = frozenset(stop_ids)
        self._stop_ids = jnp.asarray(sorted(stop_ids), jnp.int32)
        self.length_axis = transformer.ATTENTION[model.attention].LENGTH_AXIS
        self.prefill = jax.jit(self._prefill)
        self.insert = jax.jit(self._insert, donate_argnums=0)
        self.generate = jax.jit(self._generate, donate_argnums=1)
        self.resize = jax.jit(self._resize, static_argnums=2)
        self.empty = jax.jit(self._empty, static_argnums=(0, 1))

    def _lay(self, slots: Slots) -> Slots:
        """States how slots lie on the mesh."""
        axes = transformer.ATTENTION[self.model.attention].CACHE_AXES
        cache = {
            stack: [{name: sharding.constrain(a, *axes[name]) for name, a in layer.items()} for layer in layers]
            for stack, layers in slots.cache.items()
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
                    cache=jax.tree.map(
                        self._width, transformer.empty_cache(self.model, slots, length, self.cache_dtype)
                    ),
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
            out = transformer.hidden(
                params, self.model, tokens, segments=segments, keep=("cache", "experts"), paths=self.paths
            )
            last = jnp.take_along_axis(out.x, (lengths - 1)[:, None, None], axis=1)[:, 0]
            cache = jax.tree.map(lambda a: self._width(a.astype(self.cache_dtype)), out.cache)
            return Prefix(cache, transformer.logits(params, last), lengths, out.experts)

    def _insert(
        self,
        slots: Slots,
        prefix: Prefix,
        source: Int[Array, "B"],
        prompts: Int[Array, "B"],
        members: Int[Array, "B"],
        limits: Int[Array, "B"],
        rollout_key: Array,
    ) -> tuple[Slots, Drawn]:
        """Copies prefix `source[i]` into slot i (negative: leaves it alone) and draws its first token.

        Said by slot, so that each device needs nothing of another but the prompts that were read.
        """
        with sharding.use(self.layout):
            is_new, read = source >= 0, jnp.maximum(source, 0)
            keys = sample_keys(rollout_key, prompts, members)
            last = sharding.constrain(prefix.logits, None, "vocab")[read]
            last = sharding.constrain(last, "rows", "vocab")
            token, logp = draw(last, uniforms(keys, jnp.zeros_like(source)), self.drawing)
            axes = transformer.ATTENTION[self.model.attention].CACHE_AXES

            def where_new(new: Array, old: Array) -> Array:
                return jnp.where(is_new.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

            def put(path: tuple, cache: Array, new: Array) -> Array:
                new = sharding.constrain(new, None, *axes[path[-1].key][1:])[read]
                old = jax.lax.slice_in_dim(cache, 0, new.shape[self.length_axis], axis=self.length_axis)
                return jax.lax.dynamic_update_slice_in_dim(cache, where_new(new, old), 0, self.length_axis)

            # One layer after the other: every device sees all prompts of a layer, and of all layers they need not fit.
            caches, structure = jax.tree_util.tree_flatten_with_path(slots.cache)
            written: list[Array] = []
            for (path, cache), new in zip(caches, jax.tree.leaves(prefix.cache), strict=True):
                new, written[-1:] = jax.lax.optimization_barrier((new, written[-1:]))
                written.append(put(path, cache, new))
            slots = Slots(
                cache=jax.tree.unflatten(structure, written),
                token=where_new(token, slots.token),
                position=where_new(prefix.lengths[read], slots.position),
                drawn=where_new(jnp.ones_like(source), slots.drawn),
                limit=where_new(limits, slots.limit),
                is_free=where_new(jnp.isin(token, self._stop_ids) | (limits <= 1), slots.is_free),
                keys=where_new(keys, slots.keys),
            )
            return self._lay(slots), Drawn(token[None], logp[None], is_new[None], None)

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
                live = ~s.is_free
                x, cache, experts = transformer.decode_step(
                    params, self.model, s.token, s.cache, s.position, live, self.path, self.paths
                )
                token, logp = draw(transformer.logits(params, x), uniforms(s.keys, s.drawn), self.drawing)
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

            params = transformer.layers_apart(params)
            start = dataclasses.replace(slots, is_free=slots.is_free | cancel)
            _, slots, drawn = jax.lax.while_loop(more, body, (jnp.int32(0), self._lay(start), drawn))
            return slots, drawn

    def _resize(self, slots: Slots, keep: Int[Array, "R n"] | None, length: int) -> Slots:
        """The slots with another cache length, of each device's those numbered in `keep` (-1: a free one; None: all).

        R devices hold slots; each keeps some of its own, since the caches of all are more than a device can hold.
        """
        with sharding.use(self.layout):

            def take(a: Array) -> Array:
                if keep is None:
                    return a
                # Mapped over devices and not indexed by them: so the partitioner sees that nothing has to move.
                parts = a.reshape(keep.shape[0], -1, *a.shape[1:])
                return jax.vmap(lambda part, kept: part[kept])(parts, jnp.maximum(keep, 0)).reshape(-1, *a.shape[1:])

            def cut(a: Array) -> Array:
                a = take(a)
                change = length - a.shape[self.length_axis]
                pad = [(0, max(change, 0) if axis == self.length_axis else 0) for axis in range(a.ndim)]
                return jax.lax.slice_in_dim(jnp.pad(a, pad), 0, length, axis=self.length_axis)

            rest = {f.name: take(getattr(slots, f.name)) for f in dataclasses.fields(slots) if f.name != "cache"}
            if keep is not None:
                rest["is_free"] = rest["is_free"] | (keep.reshape(-1) < 0)
            return self._lay(Slots(cache=jax.tree.map(cut, slots.cache), **rest))
