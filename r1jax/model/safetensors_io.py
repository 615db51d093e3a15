"""Folders of safetensors: mistakes found from the headers alone, rows read on demand, written whole or not at all.

Files are read here and not by the `safetensors` package, so that a range of rows costs no more than its bytes, from a
bucket as from a disk, and FP8 tensors open in numpy; they are written here so that one tensor at a time is held in
memory. The format: github.com/huggingface/safetensors.
"""

import concurrent.futures
import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import ml_dtypes
import numpy as np

from r1jax import hosts
from r1jax.folders import Folder, folder_at

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor in a file: what the header says of it."""

    folder: Folder
    file: str
    name: str
    start: int  # byte at which it begins in the file
    dtype: np.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.folder.path(self.file)}: {self.name}"

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, the smallest part that is read."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def read(self, first: int = 0, last: int | None = None, buffer: np.ndarray | None = None) -> np.ndarray:
        """Rows `first` up to `last`; in `buffer` (bytes, large enough) if given."""
        last = self.shape[0] if last is None else last
        size = (last - first) * self.row_bytes
        raw = np.empty(size, np.uint8) if buffer is None else buffer[:size]
        self.folder.read_into(self.file, self.start + first * self.row_bytes, raw)
        return raw.view(self.dtype).reshape(last - first, *self.shape[1:])


def open_folder(path: str | os.PathLike[str] | Folder) -> dict[str, Stored]:
    """Every tensor of a folder by name; nothing but the headers is read.

    Raises:
        ValueError: no such folder, no safetensors in it, a missing, truncated or malformed file, an index that does not
            agree with its shards.
    """
    folder = folder_at(path)
    if not folder.exists():
        raise ValueError(f"model folder {folder} does not exist; change model.path")
    if folder.has(INDEX):
        return _open_shards(folder)
    if folder.has(SINGLE):
        return open_file(folder, SINGLE)
    if pickles := [name for name in folder.names() if name.endswith(_PICKLES)]:
        raise ValueError(
            f"{folder} holds pickled weights only ({pickles[0]}), which can run code when read; "
            "convert them to safetensors"
        )
    raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}")


def _open_shards(folder: Folder) -> dict[str, Stored]:
    index = folder.path(INDEX)
    weight_map = _read_json(folder, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to files")
    files = sorted(set(weight_map.values()))
    if outside := [file for file in files if pathlib.PurePath(file).name != file]:
        raise ValueError(f"{index} names {outside[0]!r}, which is not a file of its folder")
    there = set(folder.names())
    if missing := [file for file in files if file not in there]:
        raise ValueError(f"{folder} lacks {len(missing)} of {len(files)} shards: {listed(missing)}")
    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # from a bucket, each header is a round trip
        shards = dict(zip(files, pool.map(partial(open_file, folder), files), strict=True))
    if absent := [name for name, file in weight_map.items() if name not in shards[file]]:
        raise ValueError(f"{index} names tensors that their shards do not hold: {listed(absent)}")
    if extra := [name for file, held in shards.items() for name in held if weight_map.get(name) != file]:
        raise ValueError(f"{folder}: shards hold tensors that {INDEX} does not place there: {listed(extra)}")
    return {name: shards[file][name] for name, file in weight_map.items()}


def open_file(folder: Folder, name: str) -> dict[str, Stored]:
    """The tensors of one file by name.

    Raises:
        ValueError: truncated, malformed, or with a dtype that is no weight's.
    """
    file, size = folder.path(name), folder.size(name)
    start = 8 + int.from_bytes(folder.read(name, 0, 8), "little")
    if size < 8 or start > size:
        raise ValueError(f"{file} is truncated or no safetensors file: {size} bytes, its header needs {start}")
    try:
        header = json.loads(folder.read(name, 8, start))
        header.pop("__metadata__", None)
        spans = {tensor: (t["dtype"], tuple(t["shape"]), *t["data_offsets"]) for tensor, t in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} has a malformed header: {error}") from error
    end = 0
    for tensor, (dtype, shape, begin, stop) in sorted(spans.items(), key=lambda span: span[1][2:]):
        if dtype not in DTYPES:
            raise ValueError(f"{file}: {tensor} is {dtype}; r1jax reads {', '.join(DTYPES)}")
        if begin != end or stop - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError(
                f"{file}: the header places {tensor} {shape} {dtype} at bytes {begin} to {stop}, after {end}"
            )
        end = stop
    if start + end != size:
        raise ValueError(f"{file} is truncated or altered: {size} bytes, its header describes {start + end}")
    return {
        tensor: Stored(folder, name, tensor, start + begin, DTYPES[dtype], shape)
        for tensor, (dtype, shape, begin, _) in spans.items()
    }


def read_config(path: str | os.PathLike[str] | Folder) -> dict:
    """The folder's `config.json`.

    Raises:
        ValueError: missing or malformed.
    """
    folder = folder_at(path)
    if not folder.exists():
        raise ValueError(f"model folder {folder} does not exist; change model.path")
    if not folder.has("config.json"):
        raise ValueError(f"{folder} has no config.json; model.path must be a Hugging Face model folder")
    return _read_json(folder, "config.json")


def _read_json(folder: Folder, name: str) -> dict:
    try:
        out = json.loads(folder.text(name))
    except ValueError as error:
        raise ValueError(f"{folder.path(name)} is not JSON: {error}") from error
    if not isinstance(out, dict):
        raise ValueError(f"{folder.path(name)} must hold a JSON object")
    return out


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor to write: what its header says, and how to make it."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_folder(
    folder: pathlib.Path,
    tensors: Sequence[Tensor],
    config: Mapping,
    files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """A model folder, built under a temporary name beside its own and renamed when it is complete.

    One tensor is held in memory at a time. Above `max_shard_bytes` in all there are several shards, with an index. All
    hosts call this, on a folder that they share, and each writes a part of the shards.

    Args:
        files: content of further files by name.

    Raises:
        ValueError: the folder exists and is not empty, or a further file would replace one of ours.
        OSError: the disk is too small, or fails; nothing is left under the folder's name.
    """
    for name in files or ():
        if name in ("config.json", INDEX) or name.endswith(".safetensors"):
            raise ValueError(f"extra file {name} would replace what is exported")
    shards = _shards(tensors, max_shard_bytes)
    names = [SINGLE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
    total = sum(tensor.nbytes for tensor in tensors)
    unfinished = folder.with_name(f".{folder.name}.partial-{hosts.agree(os.getpid())}")
    if hosts.is_writer():
        check_free(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(folder.parent).free) < total:
            raise OSError(f"{folder.parent} has {free} bytes free, the model needs {total}")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
    hosts.wait()
    try:
        for name, shard in hosts.my_part(list(zip(names, shards, strict=True))):
            _write_file(unfinished / name, shard)
        hosts.wait()
        if hosts.is_writer():
            if len(shards) > 1:
                weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
                _write(unfinished / INDEX, _json({"metadata": {"total_size": total}, "weight_map": weight_map}))
            for name, content in {"config.json": _json(config), **(files or {})}.items():
                _write(unfinished / name, content)
            unfinished.rename(folder)
        hosts.wait()
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{folder} could not be written: {error.strerror or error}") from error
        raise


def _shard_name(i: int, count: int) -> str:
    return f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def check_free(folder: pathlib.Path) -> None:
    """Raises ValueError where the folder exists and is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; choose another place to export to")


def _write_file(file: pathlib.Path, tensors: Sequence[Tensor]) -> None:
    names = {dtype: name for name, dtype in DTYPES.items()}
    # transformers refuses files that do not name the framework of their layout.
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        span = [end, end := end + tensor.nbytes]
        header[tensor.name] = {"dtype": names[tensor.dtype], "shape": tensor.shape, "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            made = np.ascontiguousarray(tensor.make())
            assert (made.dtype, made.shape) == (tensor.dtype, tensor.shape), tensor.name
            stream.write(made.reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())


def _write(file: pathlib.Path, content: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _shards(tensors: Sequence[Tensor], max_shard_bytes: int) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    held = 0
    for tensor in tensors:
        if shards[-1] and held + tensor.nbytes > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor.nbytes
    return shards


def _json(value: Mapping) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def listed(names: list[str], shown: int = 3) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
