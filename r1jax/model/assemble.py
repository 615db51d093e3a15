"""Stored tensors to stacked arrays on their devices: each process reads the rows that its own parts hold, once.

One stacked leaf is assembled at a time, by many threads, in pieces of a few megabytes, and goes to the devices before
the next one begins: the host never holds more than this process's part of the largest leaf and those pieces.
"""

import concurrent.futures
import math
import threading
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from r1jax import hosts
from r1jax.model import fp8, tensors
from r1jax.model.safetensors_io import DTYPES, Stored

THREADS = 8
PIECE_BYTES = 1 << 22  # of the file, read at once by a thread; what it becomes stays within the processor's cache
Progress = Callable[[int], None]  # bytes read since the last call

# Bits of a value without its sign, and from which on they mean infinity or NaN.
_NOT_FINITE = {
    np.dtype(np.float32): (np.uint32, 0x7FFFFFFF, 0x7F800000),
    DTYPES["BF16"]: (np.uint16, 0x7FFF, 0x7F80),
    np.dtype(np.float16): (np.uint16, 0x7FFF, 0x7C00),
    fp8.FLOAT8: (np.uint8, 0x7F, 0x7F),
}


def is_finite(values: np.ndarray) -> bool:
    """Whether no value is infinite or NaN, at the speed of memory."""
    bits, mask, limit = _NOT_FINITE[values.dtype]
    return not values.size or int((values.view(bits) & bits(mask)).max()) < limit


class _Part:
    """What one or more devices hold of a leaf."""

    def __init__(self, index: tuple[slice, ...], shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.spans = [range(*part.indices(n)) for part, n in zip(index, shape, strict=True)]
        sizes = [len(span) for span in self.spans]
        # From a buffer that begins where a cache line does, a CPU device takes the array over without a copy.
        raw = np.empty(int(np.prod(sizes, dtype=np.int64)) * dtype.itemsize + 64, np.uint8)
        start = -raw.ctypes.data % 64
        self.array = raw[start : len(raw) - 64 + start].view(dtype).reshape(sizes)
        self.devices: list[jax.Device | None] = []

    def place(self, at: tuple[int, ...]) -> tuple[int, ...] | None:
        """Where the layer (and expert) `at` lies in this part; None if elsewhere."""
        inside = all(i in span for i, span in zip(at, self.spans, strict=False))
        return tuple(i - span.start for i, span in zip(at, self.spans, strict=False)) if inside else None


def assemble(
    stored: Mapping[str, Stored],
    entry: tensors.Entry,
    size: tensors.Sizes,
    block: fp8.Block | None,
    dtypes: Mapping[str, DTypeLike],
    shardings: Mapping[str, NamedSharding] | None,
    pool: concurrent.futures.Executor,
    progress: Progress,
) -> dict[str, jax.Array]:
    """The leaves that an entry's tensors stack up to, by path, laid out on their devices.

    Args:
        block: of FP8 tensors.
        dtypes: of each leaf, by path.
        shardings: of each leaf, by path; None is the default device.
        pool: runs the reading; at most THREADS threads.

    Raises:
        ValueError: NaN or infinite values; names file and tensor.
    """
    parts: dict[str, list[_Part]] = {}
    lies = {}
    for leaf, path, shape in tensors.leaves(entry, size):
        lies[path] = None if shardings is None else by_rows(shardings[path], entry, leaf, shape)
        by_index: dict[str, _Part] = {}
        whole = {None: (slice(None),) * len(shape)}
        held = whole if shardings is None else lies[path].addressable_devices_indices_map(shape)
        for device, index in held.items():
            if str(index) not in by_index:
                by_index[str(index)] = _Part(index, shape, np.dtype(dtypes[path]))
            by_index[str(index)].devices.append(device)
        parts[leaf] = list(by_index.values())
    pieces = list(_pieces(stored, entry, size, parts))
    for n in pool.map(lambda piece: _fill(stored, entry, size, block, parts, *piece), pieces):
        progress(n)
    out = {}
    for leaf, path, shape in tensors.leaves(entry, size):
        arrays = []
        while parts[leaf]:
            part = parts[leaf].pop()
            arrays += [jax.device_put(part.array, device) for device in part.devices]
            jax.block_until_ready(arrays)  # the buffer is given back here
            del part
        if shardings is None:
            (out[path],) = arrays
            continue
        out[path] = jax.make_array_from_single_device_arrays(shape, lies[path], arrays)
        if lies[path] != shardings[path]:
            out[path] = jax.jit(lambda array: array, out_shardings=shardings[path])(out[path])
    return out


def by_rows(sharding: NamedSharding, entry: tensors.Entry, leaf: str, shape: tuple[int, ...]) -> NamedSharding:
    """How a leaf lies while it is read: as at last, but among several processes split along stored rows only.

    A column can only be read with its rows: split along columns over 64 processes, all of them would read the whole
    leaf. Read by rows, nobody reads what another one does, and the devices exchange the parts.
    """
    letter = tensors.leading(entry.row)
    if hosts.count() == 1 or letter is None:
        return sharding
    spec = [*sharding.spec, *(None,) * (len(shape) - len(sharding.spec))]
    split = [(axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in spec]
    rows, moved = _axis(entry, leaf, letter), ()
    for axis in range(len(entry.lead), len(shape)):
        if axis != rows:
            moved, split[axis] = moved + split[axis], ()
    split[rows] += moved
    if shape[rows] % math.prod(sharding.mesh.shape[axis] for axis in split[rows]):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*(axes or None for axes in split)))


def _axis(entry: tensors.Entry, leaf: str, letter: str) -> int:
    return len(entry.lead) + tensors.axis_of(entry.row, leaf, letter)


def _pieces(
    stored: Mapping[str, Stored], entry: tensors.Entry, size: tensors.Sizes, parts: Mapping[str, list[_Part]]
) -> Iterator[tuple[tuple[int, ...], str, str | None, int, int]]:
    """(layer and expert, tensor, letter, first, last): what to read at once, along the letter that rows begin with."""
    letter = tensors.leading(entry.row)
    for number, name in enumerate(entry.names):
        at = np.unravel_index(number, entry.lead) if entry.lead else ()
        at = tuple(map(int, at))
        wanted = [(leaf, part) for leaf, some in parts.items() for part in some if part.place(at) is not None]
        if not wanted:
            continue
        if letter is None:
            yield at, name, None, 0, 1
            continue
        spans = [part.spans[_axis(entry, leaf, letter)] for leaf, part in wanted]
        first, last = min(span.start for span in spans), max(span.stop for span in spans)
        step = max(1, PIECE_BYTES * size[letter] // stored[name].nbytes)
        for start in range(first, last, step):
            yield at, name, letter, start, min(start + step, last)


_scratch = threading.local()


def _buffer(n_bytes: int) -> np.ndarray:
    """A thread's own memory for reading into: fresh memory would cost as much as the reading."""
    if len(getattr(_scratch, "buffer", ())) < n_bytes:
        _scratch.buffer = np.empty(n_bytes, np.uint8)
    return _scratch.buffer


def _fill(
    stored: Mapping[str, Stored],
    entry: tensors.Entry,
    size: tensors.Sizes,
    block: fp8.Block | None,
    parts: Mapping[str, list[_Part]],
    at: tuple[int, ...],
    name: str,
    letter: str | None,
    first: int,
    last: int,
) -> int:
    """Reads one piece into every part that holds some of it; the bytes read."""
    tensor, row = stored[name], entry.row
    if letter is not None:
        unit, size = tensor.shape[0] // size[letter], {**size, letter: last - first}
        raw = tensor.read(first * unit, last * unit, _buffer((last - first) * unit * tensor.row_bytes))
    else:
        unit, raw = 0, tensor.read(buffer=_buffer(tensor.nbytes))
    n_bytes, finite = raw.nbytes, is_finite(raw)
    if tensor.dtype == fp8.FLOAT8:
        scale = stored[name + fp8.SCALE].read()
        raw, finite = fp8.dequantise(raw, scale, block, first * unit), finite and is_finite(scale)
    if not finite:
        raise ValueError(f"{tensor} holds NaN or infinite values")
    for leaf, some in parts.items():
        ours = tensors.to_ours(raw, row, leaf, size)
        for part in some:
            if (place := part.place(at)) is None:
                continue
            source = [slice(span.start, span.stop) for span in part.spans[len(at) :]]
            target = [slice(None)] * ours.ndim
            if letter is not None:
                axis = tensors.axis_of(row, leaf, letter)
                span = part.spans[len(at) + axis]
                begin, end = max(first, span.start), min(last, span.stop)
                if begin >= end:
                    continue
                source[axis], target[axis] = (
                    slice(begin - first, end - first),
                    slice(begin - span.start, end - span.start),
                )
            _copy(part.array[place][tuple(target)], ours[tuple(source)])
    return n_bytes


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    if source.dtype == target.dtype:  # as integers: numpy moves those without holding other threads up
        bits = np.dtype(f"u{source.dtype.itemsize}")
        source, target = source.view(bits), target.view(bits)
    target[...] = source


def reader() -> concurrent.futures.ThreadPoolExecutor:
    """The threads that read."""
    return concurrent.futures.ThreadPoolExecutor(THREADS, "weights")
