"""Released weights (Hugging Face folders of safetensors) to our stacked tree and back, exactly.

`families` reads the configuration, `tensors` says which tensor is which leaf, `fp8` dequantises, `safetensors_io` knows
the files.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jax.typing import DTypeLike

from r1jax.model import fp8, safetensors_io, tensors
from r1jax.model.config import ModelConfig
from r1jax.model.families import config_from_hf, config_to_hf
from r1jax.model.safetensors_io import listed
from r1jax.model.transformer import logical_axes
from r1jax.sharding import layouts, tree_shardings
from r1jax.types import Params

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def tensor_plan(hf_config: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, safetensors dtype) of every tensor that a released folder with this `config.json` must hold.

    Raises:
        ValueError: a configuration that `config_from_hf` refuses, or a quantisation other than FP8 blocks.
    """
    config, block = config_from_hf(hf_config), fp8.block_of(hf_config)
    size = tensors.sizes(config)
    name = hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32"
    if name not in DTYPE_NAMES:
        raise ValueError(f"config.json has torch_dtype {name!r}; r1jax reads {', '.join(DTYPE_NAMES)}")
    plan = {}
    for entry in tensors.entries(config):
        shape = tensors.stored_shape(entry.row, size)
        dtype = "F32" if entry.row.name.endswith(tensors.FLOAT32_STORED) else DTYPE_NAMES[name]
        if block is None or not entry.row.matrix:
            plan |= dict.fromkeys(entry.names, (shape, dtype))
            continue
        plan |= dict.fromkeys(entry.names, (shape, "F8_E4M3"))
        plan |= dict.fromkeys([n + fp8.SCALE for n in entry.names], (fp8.scale_shape(shape, block), "F32"))
    return plan


def load(
    path: str | pathlib.Path, mesh: Mesh | None = None, dtype: DTypeLike | None = None
) -> tuple[ModelConfig, Params]:
    """A released model: its configuration and its weights as our parameter tree.

    Args:
        path: a folder with config.json and safetensors, single or sharded.
        mesh: lays the weights out for training over this mesh; None is the default device.
        dtype: float32 or bfloat16; None keeps the stored one (bfloat16 for FP8). Router and router bias stay float32.

    Raises:
        ValueError: anything wrong with the folder; names the file and the tensor.
    """
    folder = pathlib.Path(path)
    hf = safetensors_io.read_config(folder)
    config, block = config_from_hf(hf), fp8.block_of(hf)
    stored = safetensors_io.open_folder(folder)
    config = _without_absent_mtp(config, stored, folder)
    entries = tensors.entries(config)
    _check(folder, config, entries, stored, block)
    shardings = {}
    if mesh is not None:
        shardings = _flat(tree_shardings(logical_axes(config), layouts(mesh)["train"]))
    size, flat = tensors.sizes(config), {}
    for entry in entries:
        for leaf, at, shape in tensors.leaves(entry, size) if not entry.copy else ():
            read = partial(_read, stored, entry, leaf, size, block, _leaf_dtype(stored, entry, at, dtype), shape)
            if mesh is None:
                flat[at] = jnp.asarray(read((slice(None),) * len(shape)))
            else:
                flat[at] = jax.make_array_from_callback(shape, shardings[at], read)
    return config, unflatten_dict(flat, sep=".")


def save(
    tree: Params,
    config: ModelConfig,
    path: str | pathlib.Path,
    extra_files: Iterable[str | pathlib.Path] = (),
    hf_fields: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a Hugging Face folder that `load` reads back bit for bit and `transformers` computes the same with.

    Args:
        tree: our parameters, each leaf in the dtype it is to have on disk.
        extra_files: copied in under their own names: tokenizer, generation_config.json, chat template.
        hf_fields: fields of config.json that no ModelConfig holds, such as bos_token_id and eos_token_id.
        max_shard_bytes: larger models are split, with an index.

    Raises:
        ValueError: a tree that is not of this config, a configuration without a released family, a folder that exists.
        OSError: the disk is full.
    """
    hf = config_to_hf(config)
    flat, size = _flat(tree), tensors.sizes(config)
    entries = tensors.entries(config)
    wanted = {at: shape for e in entries if not e.copy for _, at, shape in tensors.leaves(e, size)}
    if wanted.keys() != flat.keys():
        missing, extra = sorted(wanted.keys() - flat.keys()), sorted(flat.keys() - wanted.keys())
        raise ValueError(f"the tree is not of this config: missing leaves {missing}, unexpected leaves {extra}")
    for at, shape in wanted.items():
        if flat[at].shape != shape or flat[at].dtype.name not in DTYPE_NAMES:
            raise ValueError(
                f"leaf {at} is {flat[at].shape} {flat[at].dtype}; "
                f"this config stores {shape} as {', '.join(DTYPE_NAMES)}"
            )

    def make(entry: tensors.Entry, number: int) -> np.ndarray:
        place = np.unravel_index(number, entry.lead) if entry.lead else ()
        parts = {leaf: np.asarray(flat[at])[place] for leaf, at, _ in tensors.leaves(entry, size)}
        return tensors.to_stored(parts, entry.row, size)

    def nbytes(entry: tensors.Entry) -> int:
        at = next(at for _, at, _ in tensors.leaves(entry, size))
        return math.prod(tensors.stored_shape(entry.row, size)) * flat[at].dtype.itemsize

    out = [(name, nbytes(e), partial(make, e, number)) for e in entries for number, name in enumerate(e.names)]
    fields = {**(hf_fields or {}), **hf, "torch_dtype": flat["embed"].dtype.name}
    safetensors_io.write_folder(pathlib.Path(path), out, fields, list(map(pathlib.Path, extra_files)), max_shard_bytes)


def _without_absent_mtp(config: ModelConfig, stored: Mapping[str, np.ndarray], folder: pathlib.Path) -> ModelConfig:
    # transformers drops the multi-token-prediction layer when it saves, and leaves the field as it was.
    layer = f"model.layers.{config.num_hidden_layers}."
    if not config.num_nextn_predict_layers or any(name.startswith(layer) for name in stored):
        return config
    logging.warning("%s was saved without its multi-token-prediction layer; it is loaded without one", folder)
    return dataclasses.replace(config, num_nextn_predict_layers=0)


def _check(
    folder: pathlib.Path,
    config: ModelConfig,
    entries: list[tensors.Entry],
    stored: Mapping[str, np.memmap],
    block: fp8.Block | None,
) -> None:
    """Names, shapes and dtypes against the configuration, from the headers alone; copies against what they repeat."""
    size = tensors.sizes(config)
    shapes = {name: tensors.stored_shape(entry.row, size) for entry in entries for name in entry.names}
    copies = {name: entry.row.name for entry in entries if entry.copy for name in entry.names}
    if config.tie_word_embeddings:
        shapes[tensors.HEAD.name], copies[tensors.HEAD.name] = shapes[tensors.EMBED.name], tensors.EMBED.name
    quantised = [name for name in shapes if name in stored and stored[name].dtype == fp8.FLOAT8]
    if quantised and block is None:
        raise ValueError(f"{_where(stored, quantised[0])} is FP8, but config.json has no quantization_config")
    shapes |= {name + fp8.SCALE: fp8.scale_shape(shapes[name], block) for name in quantised}
    if missing := [name for name in shapes if name not in stored and name not in copies]:
        raise ValueError(f"{folder} lacks {len(missing)} tensors that its config.json asks for: {listed(missing)}")
    if extra := [name for name in stored if name not in shapes]:
        raise ValueError(f"{folder} holds {len(extra)} tensors that its config.json has no place for: {listed(extra)}")
    for name, tensor in stored.items():
        if tensor.shape != shapes[name]:
            raise ValueError(f"{_where(stored, name)} has shape {tensor.shape}; config.json asks for {shapes[name]}")
    for name, source in copies.items():
        if name in stored and not np.array_equal(stored[name].view(np.uint8), stored[source].view(np.uint8)):
            raise ValueError(f"{_where(stored, name)} must repeat {source}, which r1jax shares, but differs from it")


def _read(
    stored: Mapping[str, np.memmap],
    entry: tensors.Entry,
    leaf: str,
    size: tensors.Sizes,
    block: fp8.Block | None,
    dtype: np.dtype,
    shape: tuple[int, ...],
    index: tuple[slice, ...],
) -> np.ndarray:
    """The given part of a stacked leaf, from the tensors that hold it."""
    spans = [range(n)[part] for n, part in zip(shape, index, strict=True)]
    out = np.empty([len(span) for span in spans], dtype)
    stack = len(entry.lead)
    for place in np.ndindex(out.shape[:stack]):
        at = [span[i] for span, i in zip(spans, place, strict=False)]
        name = entry.names[np.ravel_multi_index(at, entry.lead) if at else 0]
        tensor = stored[name]
        if tensor.dtype == fp8.FLOAT8:
            tensor = fp8.dequantise(tensor, stored[name + fp8.SCALE], block)
        part = tensors.to_ours(tensor, entry.row, leaf, size)[index[stack:]]
        if not np.isfinite(part).all():
            raise ValueError(f"{_where(stored, name)} holds NaN or infinite values")
        out[place] = part
    return out


def _leaf_dtype(stored: Mapping[str, np.memmap], entry: tensors.Entry, at: str, dtype: DTypeLike | None) -> np.dtype:
    if at.endswith(tensors.FLOAT32_LEAVES):
        return np.dtype(np.float32)
    if dtype is not None:
        return np.dtype(dtype)
    return np.result_type(
        *{BFLOAT16 if stored[name].dtype == fp8.FLOAT8 else stored[name].dtype for name in entry.names}
    )


def _flat(tree: Params) -> dict[str, Any]:
    return flatten_dict(tree, sep=".")


def _where(stored: Mapping[str, np.memmap], name: str) -> str:
    return f"{stored[name].filename}: {name}"
