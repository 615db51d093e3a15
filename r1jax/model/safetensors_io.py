"""Folders of safetensors: mapped into memory, mistakes found from the headers alone, written whole or not at all.

Files are mapped here and not opened by the `safetensors` package, so that a slice along any axis reads only the pages
it touches and FP8 tensors open in numpy; writing is the package's. The format: github.com/huggingface/safetensors.
"""

import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def open_folder(folder: pathlib.Path) -> dict[str, np.memmap]:
    """Every tensor of a folder by name, read only; nothing but the headers is read yet.

    Raises:
        ValueError: no such folder, no safetensors in it, a missing, truncated or malformed file, an index that does not
            agree with its shards.
    """
    if not folder.is_dir():
        raise ValueError(f"model folder {folder} does not exist; change model.path")
    if (folder / INDEX).is_file():
        return _open_shards(folder)
    if (folder / SINGLE).is_file():
        return open_file(folder / SINGLE)
    if pickles := sorted(f.name for f in folder.iterdir() if f.suffix in _PICKLES):
        raise ValueError(
            f"{folder} holds pickled weights only ({pickles[0]}), which can run code when read; "
            "convert them to safetensors"
        )
    raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}")


def _open_shards(folder: pathlib.Path) -> dict[str, np.memmap]:
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map from tensor names to files")
    files = sorted(set(weight_map.values()))
    if outside := [file for file in files if pathlib.PurePath(file).name != file]:
        raise ValueError(f"{folder / INDEX} names {outside[0]!r}, which is not a file of its folder")
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise ValueError(f"{folder} lacks {len(missing)} of {len(files)} shards: {listed(missing)}")
    shards = {file: open_file(folder / file) for file in files}
    if absent := [name for name, file in weight_map.items() if name not in shards[file]]:
        raise ValueError(f"{folder / INDEX} names tensors that their shards do not hold: {listed(absent)}")
    if extra := [name for file, held in shards.items() for name in held if weight_map.get(name) != file]:
        raise ValueError(f"{folder}: shards hold tensors that {INDEX} does not place there: {listed(extra)}")
    return {name: shards[file][name] for name, file in weight_map.items()}


def open_file(file: pathlib.Path) -> dict[str, np.memmap]:
    """The tensors of one file by name, mapped read only.

    Raises:
        ValueError: truncated, malformed, or with a dtype that is no weight's.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
        if size < 8 or start > size:
            raise ValueError(f"{file} is truncated or no safetensors file: {size} bytes, its header needs {start}")
        try:
            header = json.loads(stream.read(start - 8))
            header.pop("__metadata__", None)
            spans = {name: (t["dtype"], tuple(t["shape"]), *t["data_offsets"]) for name, t in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{file} has a malformed header: {error}") from error
    end = 0
    for name, (dtype, shape, begin, stop) in sorted(spans.items(), key=lambda span: span[1][2:]):
        if dtype not in DTYPES:
            raise ValueError(f"{file}: {name} is {dtype}; r1jax reads {', '.join(DTYPES)}")
        if begin != end or stop - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError(
                f"{file}: the header places {name} {shape} {dtype} at bytes {begin} to {stop}, after {end}"
            )
        end = stop
    if start + end != size:
        raise ValueError(f"{file} is truncated or altered: {size} bytes, its header describes {start + end}")
    raw = np.memmap(file, np.uint8, mode="r")
    return {
        name: raw[start + begin : start + stop].view(DTYPES[dtype]).reshape(shape)
        for name, (dtype, shape, begin, stop) in spans.items()
    }


def read_config(folder: pathlib.Path) -> dict:
    """The folder's `config.json`.

    Raises:
        ValueError: missing or malformed.
    """
    if not folder.is_dir():
        raise ValueError(f"model folder {folder} does not exist; change model.path")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; model.path must be a Hugging Face model folder")
    return _read_json(folder / "config.json")


def _read_json(file: pathlib.Path) -> dict:
    try:
        out = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(out, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return out


Tensor = tuple[str, int, Callable[[], np.ndarray]]  # name, bytes, and how to make it


def write_folder(
    folder: pathlib.Path,
    tensors: Sequence[Tensor],
    config: Mapping,
    extra_files: Sequence[pathlib.Path] = (),
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """A model folder, built under a temporary name beside its own and renamed when it is complete.

    One shard is held in memory at a time. Above `max_shard_bytes` in all there are several, with an index.

    Raises:
        ValueError: the folder exists and is not empty, an extra file is missing or would replace one of ours.
        OSError: the disk is too small, or fails; nothing is left under the folder's name.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; choose another place to export to")
    for file in extra_files:
        if not file.is_file():
            raise ValueError(f"extra file {file} does not exist")
        if file.name in ("config.json", INDEX) or file.suffix == ".safetensors":
            raise ValueError(f"extra file {file} would replace what is exported")
    shards = _shards(tensors, max_shard_bytes)
    total = sum(size for _, size, _ in tensors)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder.parent).free) < total:
        raise OSError(f"{folder.parent} has {free} bytes free, the model needs {total}")
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            # transformers refuses files that do not name the framework of their layout.
            save_file({name: make() for name, _, make in shard}, partial / file, metadata={"format": "pt"})
            weight_map |= {name: file for name, _, _ in shard}
        if len(shards) > 1:
            _write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        _write_json(partial / "config.json", config)
        for file in extra_files:
            shutil.copyfile(file, partial / file.name)
        for file in partial.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _shards(tensors: Sequence[Tensor], max_shard_bytes: int) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    held = 0
    for tensor in tensors:
        if shards[-1] and held + tensor[1] > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor[1]
    return shards


def _write_json(file: pathlib.Path, value: Mapping) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def listed(names: list[str], shown: int = 3) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
