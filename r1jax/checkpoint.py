"""Checkpoints: saved in the background, whole or not at all, restored bit for bit onto any mesh.

The one file that knows orbax. What it writes:

    FOLDER/STEP/arrays/                          orbax's own layout (OCDBT): every host writes the shards it holds
    FOLDER/STEP/manifest-00000-of-00004.json     one per host, written last

A checkpoint exists once all its manifests do, and a deletion begins with them, so that neither a save nor a deletion
that was cut short can be taken for a checkpoint. A manifest carries size and CRC-32 of a part of the files: orbax takes
a flipped bit in its data for a number like any other, and the resumed run would silently be another one. The first
manifest also carries name, shape and dtype of every array and the state of the host program.
"""

import concurrent.futures
import contextlib
import json
import logging
import os
import pathlib
import shutil
import sys
import time
import zlib
from collections.abc import Iterable
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore

from r1jax import hosts
from r1jax.types import Lazy

# orbax logs a failed save as 300 lines of tracebacks before it raises it; `wait` says it in three.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)

# Larger arrays of at least three axes are stored by their first one, that of layers: an export reads one at a time.
SPLIT_BYTES = 1 << 26
# What an export keeps of the chunks that it has read: of sharded arrays each tensor is a part of many.
CACHE_BYTES = 1 << 29


class Checkpoints:
    """The checkpoints of one stage in one folder, at most one being written at a time.

    All hosts call every method, at the same points of the program. Use it in a `with` statement (or call `close` in a
    `finally`): a process that ends without it loses the save under way.
    """

    def __init__(self, folder: str | os.PathLike[str], *, save_every: int, keep: int, keep_every: int = 0) -> None:
        """Nothing is read or written yet.

        Args:
            folder: on a file system that all hosts share.
            save_every: optimizer steps between two checkpoints (config.checkpoint.save_every).
            keep: how many of the newest stay (config.checkpoint.keep).
            keep_every: steps that are multiples of it stay for ever; 0 for none (config.checkpoint.keep_every).

        Raises:
            ValueError: a number is too small, or the folder is a URL.
        """
        for key, value, least in (("save_every", save_every, 1), ("keep", keep, 1), ("keep_every", keep_every, 0)):
            if value < least:
                raise ValueError(f"config.checkpoint.{key} = {value}: wanted {least} or more")
        if "://" in os.fspath(folder):
            raise ValueError(f"--workdir: checkpoints need a mounted folder (NFS, Filestore, gcsfuse), not {folder}")
        self.folder = pathlib.Path(folder).absolute()
        self.save_every, self.keep, self.keep_every = save_every, keep, keep_every
        # Compression saves 8% of random float32 weights and costs half of the time.
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False))
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving: tuple[int, concurrent.futures.Future] | None = None
        self._has_saved = False

    def due(self, step: int) -> bool:
        """Whether a checkpoint belongs after this optimizer step."""
        return step % self.save_every == 0

    def steps(self) -> list[int]:
        """The steps of all whole checkpoints, ascending; whether their content is sound shows in `restore`."""
        return whole_steps(self.folder)

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint, or None."""
        return latest_step(self.folder)

    def save(self, step: int, tree: Any, host: dict[str, Any]) -> None:
        """Copies `tree` to the hosts, then returns; the writing goes on in the background.

        The arrays may be donated as soon as this returns. A save still under way is waited for first; a step that has a
        checkpoint already keeps the one it has.

        Args:
            step: optimizer steps done.
            tree: jax arrays in any nest of containers, sharded in any way; PRNG keys as `jax.random.key_data`.
            host: what else the run continues from (data cursor, schedules, counters), alike on all hosts. It must
                survive JSON: string keys, lists instead of tuples.

        Raises:
            OSError: no room for it, or it (or the save before it) could not be written; older checkpoints are unharmed.
        """
        self.wait()
        copy = json.loads(json.dumps(host))  # the caller goes on counting
        assert copy == host, f"the host state changes on its way through JSON: {host}"
        if step in self.steps():
            return
        arrays = dict(_named(tree))
        self._make_room(step, sum(array.nbytes for array in arrays.values()))
        record = {
            "step": step,
            "host": copy,
            "arrays": {name: _describe(array) for name, array in arrays.items()},
        }
        try:
            how = {name: ocp.SaveArgs(shard_axes=_split(array)) for name, array in arrays.items()}
            self._orbax.save(self.folder / str(step) / "arrays", args=ocp.args.PyTreeSave(arrays, how))
        except OSError as error:
            raise self._not_written(step, _brief(error)) from error
        self._saving = step, self._thread.submit(self._finish, step, record)
        self._has_saved = True

    def wait(self) -> None:
        """Returns when no host has a save under way.

        Raises:
            OSError: the last save could not be written (disk full, quota, permission), by this host or another.
        """
        if self._saving:
            (step, saving), self._saving = self._saving, None
            error = saving.exception()
            if problem := next(filter(None, hosts.gather(error and _brief(error))), None):
                raise self._not_written(step, problem) from error

    def close(self) -> None:
        """Waits for the save under way (raising as `wait` does) and ends the background threads.

        While an exception passes it asks nobody: the others may be elsewhere in the program.
        """
        try:
            if sys.exception() is None:
                self.wait()
            elif self._saving:
                self._saving[1].exception()
            if self._has_saved:  # a reader deletes nothing
                self._prune()
        finally:
            self._thread.shutdown()
            self._orbax.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """The tree and the host state saved at `step`, bit for bit.

        Args:
            step: one of `steps()`.
            like: `jax.ShapeDtypeStruct`s with the shardings wanted, on any mesh (none: the first device). Its top level
                may leave parts out, which are then not read: a stage takes over the policy without the optimizer.

        Raises:
            ValueError: no such checkpoint; another structure, shape or dtype; or damaged files. Nothing is replaced
                silently: the error names the newest sound checkpoint and what to delete to continue from there.
        """
        wanted = dict(_named(like))
        record = self._sound(step, wanted)
        how = {name: ocp.ArrayRestoreArgs(sharding=_sharding(leaf)) for name, leaf in wanted.items()}
        args = ocp.args.PyTreeRestore(wanted, how, partial_restore=True)
        arrays = self._orbax.restore(self.folder / str(step) / "arrays", args=args)
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted]), record["host"]

    def open(self, step: int, like: Any) -> Any:
        """The tree saved at `step` as `Lazy` leaves, of which nothing is read yet; for a single process.

        Args:
            like: as for `restore`; its shardings do not matter.

        Raises:
            ValueError: as `restore`.
        """
        wanted = dict(_named(like))
        self._sound(step, wanted)
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
        base = f"file://{self.folder / str(step) / 'arrays'}/"

        def lazy(name: str, leaf: Any) -> Lazy:
            spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}
            stored = tensorstore.open(spec, context=context, open=True, read=True).result()
            return Lazy(leaf.shape, leaf.dtype, lambda place: stored[place].read().result())

        return jax.tree.unflatten(jax.tree.structure(like), [lazy(*pair) for pair in wanted.items()])

    def _sound(self, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
        """The manifest of a step whose files are whole and fit `wanted`; ValueError as `restore` says."""
        self.wait()
        if step not in (steps := self.steps()):
            there = f"it holds steps {', '.join(map(str, steps))}" if steps else "it holds none"
            there = there if self.folder.is_dir() else "there is no such folder"
            raise ValueError(f"no checkpoint of step {step} in {self.folder}: {there}; check --workdir")
        # One host may meet the damage that another is spared: all of them stop.
        if damage := next(filter(None, hosts.gather(_damage(self.folder / str(step)))), None):
            raise ValueError(f"{damage}. {self._way_out(step, steps)}")
        record = _read_manifest(_manifests(self.folder / str(step))[0])
        if difference := _first_difference(record["arrays"], wanted):
            raise ValueError(
                f"checkpoint {self.folder / str(step)} does not fit this config: {difference}. Set config.model and "
                "config.optim to what the run folder's config.json says, or start anew under another --workdir"
            )
        return record

    def _make_room(self, step: int, n_bytes: int) -> None:
        """Clears away what a killed run left (not earlier: a reader must not touch what another process is saving)."""
        problem = None
        if hosts.is_writer():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                for path in self.folder.iterdir():
                    if path.name.isdigit() and not _manifests(path):
                        _delete(path)
                if (free := shutil.disk_usage(self.folder).free) < n_bytes:
                    problem = f"it takes {n_bytes / 1e9:.3f} GB, {free / 1e9:.3f} GB are free"
            except OSError as error:
                problem = str(error)
        if problem := hosts.agree(problem):
            raise self._not_written(step, problem)

    def _not_written(self, step: int, problem: str) -> OSError:
        steps = _steps(self.folder)
        good = f"the run can continue from step {steps[-1]}" if steps else "there is no older one"
        return OSError(
            f"the checkpoint of step {step} could not be written to {self.folder} ({problem}); {good}. Make room or "
            f"keep fewer (config.checkpoint.keep = {self.keep}, .keep_every = {self.keep_every}), then start again"
        )

    def _finish(self, step: int, record: dict[str, Any]) -> None:
        """In the background: waits for orbax, then makes the checkpoint exist, then lets the oldest go."""
        self._orbax.wait_until_finished()
        path = self.folder / str(step)
        files = {name: _fingerprint(path / name) for name in hosts.my_part(_files(path))}
        _write_manifest(path, {**record, "files": files} if hosts.is_writer() else {"files": files})
        self._prune()

    def _prune(self) -> None:
        # While another host still writes its manifest, the oldest checkpoint counts and stays until the next time.
        for old in _steps(self.folder)[: -self.keep] if hosts.is_writer() else ():
            if not self.keep_every or old % self.keep_every:
                _delete(self.folder / str(old))

    def _way_out(self, step: int, steps: Iterable[int]) -> str:
        """What to do when `step` is damaged: which checkpoint is sound, and what to delete to continue from it."""
        doomed = [step]
        for older in sorted((s for s in steps if s < step), reverse=True):
            if not any(hosts.gather(_damage(self.folder / str(older)))):
                folders = " ".join(str(self.folder / str(s)) for s in doomed)
                return f"The last good one is step {older}; to continue from it, delete {folders}"
            doomed.append(older)
        return f"No older one is good; to start this stage anew, delete {self.folder}"


def latest_step(folder: str | os.PathLike[str]) -> int | None:
    """The step of the newest whole checkpoint in a folder, or None."""
    return hosts.agree(max(_steps(pathlib.Path(folder)), default=None))


def whole_steps(folder: str | os.PathLike[str]) -> list[int]:
    """The steps of all whole checkpoints in a folder, ascending."""
    return hosts.agree(_steps(pathlib.Path(folder)))


def _named(tree: Any) -> list[tuple[str, Any]]:
    """(dotted path, leaf) in the tree's order. Only names go to disk, so a dict reads back what a dataclass wrote."""
    paths = jax.tree.leaves_with_path(tree)
    leaves = [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in paths]
    assert len(dict(leaves)) == len(leaves), "two leaves of the tree have the same path"
    for name, leaf in leaves:
        assert isinstance(leaf, jax.Array | jax.ShapeDtypeStruct), f"{name} is a {type(leaf).__name__}, not a jax.Array"
        assert not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key), f"{name}: save jax.random.key_data(key)"
    return leaves


def _split(array: jax.Array) -> tuple[int, ...]:
    return (0,) if array.ndim > 2 and array.nbytes > SPLIT_BYTES else ()


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _first_difference(saved: dict[str, str], like: dict[str, Any]) -> str | None:
    wanted = {name: _describe(leaf) for name, leaf in like.items()}
    parts = {name.split(".")[0] for name in wanted}
    saved = {name: kind for name, kind in saved.items() if name.split(".")[0] in parts}
    names = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
    if not names:
        return None
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"{names[0]} is {saved.get(names[0], 'not')} there, wanted {wanted.get(names[0], 'without it')}{more}"


def _sharding(leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    return leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _steps(folder: pathlib.Path) -> list[int]:
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(path.name) for path in paths if path.name.isdigit() and _manifests(path))


def _manifests(path: pathlib.Path) -> list[pathlib.Path]:
    """The manifests of a whole checkpoint, the writer's first; none at all when one is missing."""
    there = sorted(path.glob("manifest-*-of-*.json"))
    return there if there and len(there) == int(there[0].stem.split("-")[-1]) else []


def _files(path: pathlib.Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in (path / "arrays").rglob("*") if file.is_file())


def _fingerprint(path: pathlib.Path) -> list[int]:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return [path.stat().st_size, crc]


def _crc(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _write_manifest(path: pathlib.Path, record: dict[str, Any]) -> None:
    name = f"manifest-{hosts.index():05d}-of-{hosts.count():05d}.json"
    hosts.atomic_write(path / name, json.dumps({**record, "crc32": _crc(record)}))


def _read_manifest(path: pathlib.Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
        if record.pop("crc32") == _crc(record):
            return record
    except (ValueError, KeyError, AttributeError, TypeError):
        pass  # cut short, or no longer what was written
    raise ValueError(f"{path} is damaged")


def _damage(path: pathlib.Path) -> str | None:
    """What is wrong with this host's part of a checkpoint's files, or None. Reads every one of them."""
    files: dict[str, list[int]] = {}
    try:
        for manifest in _manifests(path):
            files.update(_read_manifest(manifest)["files"])
        for name in hosts.my_part(sorted(files)):
            found, wanted = _fingerprint(path / name), files[name]
            if found[0] != wanted[0]:
                return f"{path / name} is damaged: {found[0]} bytes, wanted {wanted[0]}"
            if found != wanted:
                return f"{path / name} is damaged: its content has changed"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _delete(path: pathlib.Path) -> None:
    """The manifests go first: half a checkpoint must not look like one when the deletion is cut short."""
    for manifest in sorted(path.glob("manifest-*")):
        manifest.unlink()
    for wait_s in (0.1, 1.0, 10.0):
        with contextlib.suppress(OSError):
            return shutil.rmtree(path)
        time.sleep(wait_s)  # a write that was given up may still be adding files
    shutil.rmtree(path)


def _brief(error: BaseException) -> str:
    # TensorStore appends its whole configuration.
    text = " ".join(str(error).split()).partition(" [tensorstore_spec=")[0] or type(error).__name__
    return text if len(text) < 400 else f"{text[:200]} ... {text[-200:]}"
