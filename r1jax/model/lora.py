"""Low-rank adapters (LoRA: arXiv 2106.09685) of attention and dense matrices: W + alpha / rank * B A.

Adapters are a parameter tree of their own beside the frozen weights. They lie as PEFT stores them, A [rank, in] and B
[out, rank] of the released matrices, stacked over layers. In training a stack's leaf is an `Adapted` one, which the
scan over layers sums for its layer: gradients and optimizer state exist for A and B alone, a full matrix and its
gradient for one layer at a time (with config.model.remat=full; without it the sums are kept for the backward pass).
`merge` adds all of them, for decoding and export. (qwix intercepts the calls of Flax modules; ours are functions of
plain trees.)
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array
from safetensors import SafetensorError
from safetensors.numpy import load, save

from r1jax import hosts
from r1jax.model import tensors
from r1jax.model.config import ModelConfig
from r1jax.types import Lazy, Params

KEY = "adapters"  # the one top-level key of the tree
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"  # files of PEFT


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["frozen", "a", "b"],
    meta_fields=["row", "leaf", "sizes", "scale", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A stacked leaf of ours beside its adapters; a scan over layers takes it apart as it does an array."""

    frozen: Array  # [layers, ...]
    a: Array  # [layers, rank, in]
    b: Array  # [layers, out, rank]
    row: tensors.Row
    leaf: str
    sizes: tuple[tuple[str, int], ...]
    scale: float
    dtype: str

    def of_layer(self) -> Array:
        """The sum in float32, rounded to `dtype`, once the leading axis is gone."""
        change = tensors.to_ours(self.scale * (self.b @ self.a), self.row, self.leaf, dict(self.sizes))
        return (self.frozen.astype(jnp.float32) + change).astype(self.dtype)


def of_layer(p: Params) -> Params:
    """One layer's weights, with adapters added where there are any."""
    is_adapted = lambda leaf: isinstance(leaf, Adapted)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.of_layer() if is_adapted(leaf) else leaf, p, is_leaf=is_adapted)


@dataclasses.dataclass(frozen=True)
class Lora:
    """Size and place of adapters; config.lora."""

    rank: int
    alpha: float  # the product of A and B counts alpha / rank times
    targets: tuple[str, ...]  # released names of matrices: q_proj, gate_proj; see `modules`

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"config.lora has rank {self.rank} and alpha {self.alpha}; wanted both above zero")


def modules(config: ModelConfig) -> dict[str, tensors.Entry]:
    """Every matrix that an adapter may have, by stack and released module: "dense.self_attn.q_proj".

    Routed experts have none, nor has the layer of multi-token prediction.
    """
    found = [e for e in tensors.entries(config) if e.row.matrix and len(e.lead) == 1 and not e.prefix.startswith("mtp")]
    return {entry.prefix + entry.row.name.removesuffix(".weight"): entry for entry in found}


def adapted(config: ModelConfig, lora: Lora) -> dict[str, tensors.Entry]:
    """The modules that `lora.targets` name.

    Raises:
        ValueError: a target that this model has not.
    """
    there = modules(config)
    known = {name.rpartition(".")[2] for name in there}
    if unknown := [target for target in lora.targets if target not in known]:
        raise ValueError(f"config.lora.targets has {unknown[0]!r}; this model has {', '.join(sorted(known))}")
    if not lora.targets:
        raise ValueError(f"config.lora.targets is empty; this model has {', '.join(sorted(known))}")
    return {name: entry for name, entry in there.items() if name.rpartition(".")[2] in lora.targets}


def shapes(config: ModelConfig, lora: Lora) -> Params:
    """Shape and dtype of every adapter: a [layers, rank, in] and b [layers, out, rank], float32."""
    size, out = tensors.sizes(config), {}
    for name, entry in adapted(config, lora).items():
        rows, columns = tensors.stored_shape(entry.row, size)
        a, b = (*entry.lead, lora.rank, columns), (*entry.lead, rows, lora.rank)
        out[name] = {"a": jax.ShapeDtypeStruct(a, jnp.float32), "b": jax.ShapeDtypeStruct(b, jnp.float32)}
    return {KEY: out}


def init(config: ModelConfig, lora: Lora, key: Array) -> Params:
    """Adapters that change nothing yet: A uniform in ±1/sqrt(in) as PEFT draws it, B zero."""
    like = shapes(config, lora)[KEY]
    out = {}
    for (name, pair), one in zip(like.items(), jax.random.split(key, len(like)), strict=True):
        bound = 1 / math.sqrt(pair["a"].shape[-1])
        a = jax.random.uniform(one, pair["a"].shape, minval=-bound, maxval=bound)
        out[name] = {"a": a, "b": jnp.zeros(pair["b"].shape)}
    return {KEY: out}


def adapt(frozen: Params, weights: Params, params: Params, config: ModelConfig, lora: Lora, dtype: str) -> Params:
    """`weights`, the frozen ones in the compute dtype, with `Adapted` leaves where there are adapters."""
    size, was, flat = tensors.sizes(config), flatten_dict(frozen, sep="."), flatten_dict(weights, sep=".")
    for name, entry in adapted(config, lora).items():
        pair = params[KEY][name]
        for leaf, path, _ in tensors.leaves(entry, size):
            how = (entry.row, leaf, tuple(size.items()), lora.alpha / lora.rank, dtype)
            flat[path] = Adapted(was[path], pair["a"], pair["b"], *how)
    return unflatten_dict(flat, sep=".")


def merge(frozen: Params, params: Params, config: ModelConfig, lora: Lora) -> Params:
    """The whole model's weights: the frozen ones, those with an adapter as float32 sums."""
    size, flat = tensors.sizes(config), flatten_dict(frozen, sep=".")
    for name, entry in adapted(config, lora).items():
        pair = params[KEY][name]
        change = lora.alpha / lora.rank * jnp.einsum("lor,lri->loi", pair["b"], pair["a"])
        for leaf, path, _ in tensors.leaves(entry, size):
            ours = jax.vmap(lambda one, e=entry, leaf=leaf: tensors.to_ours(one, e.row, leaf, size))(change)
            flat[path] = flat[path].astype(jnp.float32) + ours
    return unflatten_dict(flat, sep=".")


def merge_lazily(frozen: Params, params: Mapping, config: ModelConfig, lora: Lora) -> Params:
    """As `merge`, of `Lazy` frozen leaves and adapters on the host: nothing is added before it is read."""
    size, flat = tensors.sizes(config), flatten_dict(frozen, sep=".")

    def summed(leaf: str, entry: tensors.Entry, was: Lazy, pair: Mapping[str, np.ndarray]) -> Lazy:
        def read(place: tuple[int, ...]) -> np.ndarray:
            change = np.float32(lora.alpha / lora.rank) * (pair["b"][place] @ pair["a"][place])
            return was[place].astype(np.float32) + tensors.to_ours(change, entry.row, leaf, size)

        return Lazy(was.shape, np.dtype(np.float32), read)

    for name, entry in adapted(config, lora).items():
        for leaf, path, _ in tensors.leaves(entry, size):
            flat[path] = summed(leaf, entry, flat[path], params[KEY][name])
    return unflatten_dict(flat, sep=".")


def save_peft(
    params: Mapping, config: ModelConfig, lora: Lora, folder: str | os.PathLike[str], base: str | None = None
) -> None:
    """Leaves adapter_config.json and adapter_model.safetensors, which `peft` puts on the released model.

    In a mixture of experts peft 0.21 takes gate_proj, up_proj and down_proj for its fused experts': there it reads
    adapters of attention only. WORKDIR/model has all of them merged.

    Args:
        params: adapters, on the host.
        base: name or path of the released model.
    """
    folder, weights, targets = pathlib.Path(folder), {}, []
    for name, entry in adapted(config, lora).items():
        targets.append(entry.row.name.removesuffix(".weight"))
        for layer, stored in enumerate(entry.names):
            module = f"base_model.model.{stored.removesuffix('.weight')}"
            for theirs, ours in (("lora_A", "a"), ("lora_B", "b")):
                weights[f"{module}.{theirs}.weight"] = np.ascontiguousarray(params[KEY][name][ours][layer])
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted(set(targets)),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    hosts.atomic_write(folder / WEIGHTS, save(weights, metadata={"format": "pt"}))
    hosts.atomic_write(folder / SETTINGS, json.dumps(described, indent=2) + "\n")


def settings(folder: pathlib.Path) -> tuple[Lora, str]:
    """Size and place of the adapters that `save_peft` left, and the path of the model that they belong to.

    Raises:
        ValueError: a damaged file.
    """
    try:
        was = json.loads((folder / SETTINGS).read_text("utf-8"))
        targets = sorted({target.rpartition(".")[2] for target in was["target_modules"]})
        return Lora(was["r"], was["lora_alpha"], tuple(targets)), str(was["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / SETTINGS} is damaged ({error!r}); begin anew under another --workdir") from error


def load_peft(folder: pathlib.Path, config: ModelConfig, lora: Lora) -> dict:
    """What `save_peft` left with these settings, as arrays on the host.

    Raises:
        ValueError: a damaged file, or adapters of another model.
    """
    path, out = folder / WEIGHTS, shapes(config, lora)
    try:
        weights = load(path.read_bytes())
        for name, entry in adapted(config, lora).items():
            for theirs, ours in (("lora_A", "a"), ("lora_B", "b")):
                stored = [f"base_model.model.{one.removesuffix('.weight')}.{theirs}.weight" for one in entry.names]
                found = np.stack([weights[one] for one in stored])
                if found.shape != out[KEY][name][ours].shape:
                    raise ValueError(f"{stored[0]} is {found.shape[1:]}")
                out[KEY][name][ours] = found
    except (ValueError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"{path} is damaged or of another model ({error}); begin anew under another --workdir"
        ) from error
    return out
