"""Released weights (Hugging Face folders of safetensors) to our stacked tree and back, exactly.

`families` reads the configuration, `tensors` says which tensor is which leaf, `assemble` lays them out, `fp8` quantises
and back, `safetensors_io` knows the files.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jax.typing import DTypeLike

from r1jax import hosts
from r1jax.folders import Folder, folder_at
from r1jax.model import fp8, safetensors_io, tensors
from r1jax.model.assemble import PIECE_BYTES, assemble, is_finite, reader
from r1jax.model.config import ModelConfig
from r1jax.model.families import config_from_hf, config_to_hf
from r1jax.model.safetensors_io import Stored, Tensor, listed
from r1jax.model.transformer import logical_axes
from r1jax.sharding import layouts, tree_shardings
from r1jax.types import Lazy, Params

FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
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


def open_model(path: str | os.PathLike[str] | Folder) -> tuple[ModelConfig, dict[str, Any], dict[str, Stored]]:
    """A released model's configuration, its `config.json`, and its tensors, of which only the headers are read.

    Raises:
        ValueError: a folder, configuration or header that is wrong; names the file.
    """
    folder = folder_at(path)
    hf = safetensors_io.read_config(folder)
    config, stored = config_from_hf(hf), safetensors_io.open_folder(folder)
    return _without_absent_mtp(config, stored, folder), hf, stored


def load(
    path: str | os.PathLike[str] | Folder,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ModelConfig, Params]:
    """A released model: its configuration and its weights as our parameter tree.

    Args:
        path: a folder with config.json and safetensors, single or sharded; local or a URL that fsspec opens.
        mesh: lays the weights out for training over this mesh; None is the default device.
        dtype: float32 or bfloat16; None keeps the stored one (bfloat16 for FP8). Router and router bias stay float32.
        progress: called with the bytes read so far and those that this process reads at most.

    Raises:
        ValueError: anything wrong with the folder; names the file and the tensor.
    """
    folder = folder_at(path)
    config, hf, stored = open_model(folder)
    block, entries = fp8.block_of(hf), tensors.entries(config)
    _check(folder, config, entries, stored, block)
    shardings = None
    if mesh is not None:
        shardings = _flat(tree_shardings(logical_axes(config), layouts(mesh)["train"]))
    size, flat, done = tensors.sizes(config), {}, 0
    entries = [entry for entry in entries if not entry.copy]
    total = sum(stored[name].nbytes for entry in entries for name in entry.names)

    def count(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        if progress is not None:
            progress(done, total)

    with reader() as pool:
        for entry in entries:
            dtypes = {at: _leaf_dtype(stored, entry, at, dtype) for _, at, _ in tensors.leaves(entry, size)}
            flat |= assemble(stored, entry, size, block, dtypes, shardings, pool, count)
    return config, unflatten_dict(flat, sep=".")


def open_leaves(path: str | os.PathLike[str] | Folder, dtype: DTypeLike) -> tuple[ModelConfig, Params]:
    """As `load`, but the leaves are `Lazy`: each tensor is read when its place in a leaf is asked for.

    Raises:
        ValueError: as `load`, that of a value which is not finite only when it is read.
    """
    folder = folder_at(path)
    config, hf, stored = open_model(folder)
    block, entries, size = fp8.block_of(hf), tensors.entries(config), tensors.sizes(config)
    _check(folder, config, entries, stored, block)

    def lazy(entry: tensors.Entry, leaf: str, at: str, shape: tuple[int, ...]) -> Lazy:
        kept = _leaf_dtype(stored, entry, at, dtype)

        def read(place: tuple[int, ...]) -> np.ndarray:
            tensor = stored[entry.names[np.ravel_multi_index(place, entry.lead) if place else 0]]
            return tensors.to_ours(_values(tensor, stored, block), entry.row, leaf, size).astype(kept)

        return Lazy(shape, kept, read)

    flat = {at: lazy(e, leaf, at, n) for e in entries if not e.copy for leaf, at, n in tensors.leaves(e, size)}
    return config, unflatten_dict(flat, sep=".")


def _values(tensor: Stored, stored: Mapping[str, Stored], block: fp8.Block | None) -> np.ndarray:
    values = tensor.read()
    if tensor.dtype == fp8.FLOAT8:
        values = fp8.dequantise(values, stored[tensor.name + fp8.SCALE].read(), block)
    if not is_finite(values):
        raise ValueError(f"{tensor} holds NaN or infinite values")
    return values


def save(
    tree: Params,
    config: ModelConfig,
    path: str | os.PathLike[str],
    extra_files: Mapping[str, bytes] | None = None,
    hf_fields: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    dtype: DTypeLike | None = None,
    block: fp8.Block | None = None,
) -> None:
    """Writes a Hugging Face folder that `load` reads back bit for bit and `transformers` computes the same with.

    Args:
        tree: our parameters, as arrays or `Lazy` leaves: one stored tensor is held in memory at a time.
        extra_files: further files by name: tokenizer, generation_config.json, chat template.
        hf_fields: fields of config.json that no ModelConfig holds, such as bos_token_id and eos_token_id.
        max_shard_bytes: larger models are split, with an index.
        dtype: of the tensors on disk: float32, bfloat16 or float16; None: each leaf's own.
        block: rows and columns of the blocks in which matrices become FP8, as `fp8.RELEASED`; None: they do not.

    Raises:
        ValueError: a tree that is not of this config, a configuration without a released family, FP8 for another kind
            than DeepSeek's, a folder that exists.
        OSError: the disk is full.
    """
    hf = config_to_hf(config)
    if block is not None and config.attention != "mla":
        raise ValueError(f"FP8 blocks are for DeepSeek kinds; this model is a {hf['model_type']}")
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

    def make(entry: tensors.Entry, number: int, kept: np.dtype) -> np.ndarray:
        place = np.unravel_index(number, entry.lead) if entry.lead else ()
        parts = {leaf: np.asarray(flat[at][place]) for leaf, at, _ in tensors.leaves(entry, size)}
        return tensors.to_stored(parts, entry.row, size).astype(kept, copy=False)

    @functools.lru_cache(1)  # a weight and its scale are written one after the other
    def quantised(entry: tensors.Entry, number: int) -> tuple[np.ndarray, np.ndarray]:
        return fp8.quantise(make(entry, number, FLOAT32), block)

    out = []
    for entry in entries:
        at = next(at for _, at, _ in tensors.leaves(entry, size))
        shape, kept = tensors.stored_shape(entry.row, size), np.dtype(flat[at].dtype if dtype is None else dtype)
        if entry.row.name.endswith(tensors.FLOAT32_STORED):
            kept = FLOAT32
        for number, name in enumerate(entry.names):
            if block is None or not entry.row.matrix:
                out.append(Tensor(name, kept, shape, functools.partial(make, entry, number, kept)))
                continue
            out.append(Tensor(name, fp8.FLOAT8, shape, lambda e=entry, n=number: quantised(e, n)[0]))
            scales = fp8.scale_shape(shape, block)
            out.append(Tensor(name + fp8.SCALE, FLOAT32, scales, lambda e=entry, n=number: quantised(e, n)[1]))
    fields = {**(hf_fields or {}), **hf, "torch_dtype": np.dtype(dtype or flat["embed"].dtype).name}
    if block is not None:
        fields["quantization_config"] = fp8.described(block)
    safetensors_io.write_folder(pathlib.Path(path), out, fields, extra_files, max_shard_bytes)


def _without_absent_mtp(config: ModelConfig, stored: Mapping[str, Stored], folder: Folder) -> ModelConfig:
    # transformers drops the multi-token-prediction layer when it saves, and leaves the field as it was.
    layer = f"model.layers.{config.num_hidden_layers}."
    if not config.num_nextn_predict_layers or any(name.startswith(layer) for name in stored):
        return config
    logging.warning("%s was saved without its multi-token-prediction layer; it is loaded without one", folder)
    return dataclasses.replace(config, num_nextn_predict_layers=0)


def _check(
    folder: Folder,
    config: ModelConfig,
    entries: list[tensors.Entry],
    stored: Mapping[str, Stored],
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
        raise ValueError(f"{stored[quantised[0]]} is FP8, but config.json has no quantization_config")
    shapes |= {name + fp8.SCALE: fp8.scale_shape(shapes[name], block) for name in quantised}
    if missing := [name for name in shapes if name not in stored and name not in copies]:
        raise ValueError(f"{folder} lacks {len(missing)} tensors that its config.json asks for: {listed(missing)}")
    if extra := [name for name in stored if name not in shapes]:
        raise ValueError(f"{folder} holds {len(extra)} tensors that its config.json has no place for: {listed(extra)}")
    for name, tensor in stored.items():
        if tensor.shape != shapes[name]:
            raise ValueError(f"{tensor} has shape {tensor.shape}; config.json asks for {shapes[name]}")
    for name, source in copies.items():
        if name in stored and not _is_same(stored[name], stored[source]):
            raise ValueError(f"{stored[name]} must repeat {source}, which r1jax shares, but differs from it")


def _leaf_dtype(stored: Mapping[str, Stored], entry: tensors.Entry, at: str, dtype: DTypeLike | None) -> np.dtype:
    if at.endswith(tensors.FLOAT32_LEAVES):
        return FLOAT32
    if dtype is not None:
        return np.dtype(dtype)
    return np.result_type(
        *{BFLOAT16 if stored[name].dtype == fp8.FLOAT8 else stored[name].dtype for name in entry.names}
    )


def _flat(tree: Params) -> dict[str, Any]:
    return flatten_dict(tree, sep=".")


def _is_same(one: Stored, other: Stored) -> bool:
    """Whether two tensors of one shape are alike bit for bit; each process compares a part."""
    step = max(1, PIECE_BYTES // one.row_bytes)
    alike = one.dtype == other.dtype and all(
        np.array_equal(*(t.read(first, min(first + step, t.shape[0])).view(np.uint8) for t in (one, other)))
        for first in hosts.my_part(range(0, one.shape[0], step))
    )
    return not hosts.any_across(not alike)
