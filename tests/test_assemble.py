"""Weights are read once, in pieces, by the rows that a process holds, and the host holds one leaf at a time."""

import dataclasses
import math
import pathlib
import tracemalloc

import fsspec
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from folders import CONFIGS, DEEPSEEK, GQA, edit, random_tree
from jax.sharding import PartitionSpec

from r1jax import hosts
from r1jax.folders import Folder, folder_at
from r1jax.model import assemble, convert, safetensors_io, tensors, transformer
from r1jax.model.config import ModelConfig
from r1jax.sharding import layouts, make_mesh, tree_shardings

MESHES = [{"fsdp": 2, "expert": 2, "tensor": 2}, {"data": 8}, {"fsdp": 4, "tensor": 2}]


def assert_same(got: dict, want: dict) -> None:
    got, want = flatten_dict(got, sep="."), flatten_dict(want, sep=".")
    assert got.keys() == want.keys()
    for at, leaf in want.items():
        assert got[at].dtype == leaf.dtype, at
        np.testing.assert_array_equal(np.asarray(got[at]), np.asarray(leaf), err_msg=at)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_pieces_make_the_whole(config: ModelConfig, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = random_tree(config)
    convert.save(tree, config, tmp_path / "out")
    read, read_into = [], Folder.read_into

    def counted(folder: Folder, file: str, start: int, out: np.ndarray) -> None:
        read.append((start, len(out)))
        read_into(folder, file, start, out)

    monkeypatch.setattr(assemble, "PIECE_BYTES", 100)
    monkeypatch.setattr(Folder, "read_into", counted)
    stored = safetensors_io.open_folder(tmp_path / "out")
    copies = [name for entry in tensors.entries(config) if entry.copy for name in entry.names]
    wanted = sum(tensor.nbytes for name, tensor in stored.items() if name not in copies)
    for mesh in MESHES if config is DEEPSEEK else MESHES[:1]:
        read.clear()
        monkeypatch.setattr(convert, "_is_same", lambda *_: True)
        assert_same(convert.load(tmp_path / "out", make_mesh(mesh))[1], tree)
        assert sum(n for _, n in read) == wanted, "nothing is read twice, whatever is held twice"
        assert len(set(read)) == len(read) > 2 * len(stored) / 3


def test_a_process_reads_its_own_rows_only(tmp_path: pathlib.Path) -> None:
    convert.save(random_tree(GQA), GQA, tmp_path / "out")
    stored, size = safetensors_io.open_folder(tmp_path / "out"), tensors.sizes(GQA)
    entries = {entry.row.name: entry for entry in tensors.entries(GQA)}

    def bytes_read(name: str, index: tuple[slice, ...]) -> int:
        entry = entries[name]
        ((leaf, _, shape),) = tensors.leaves(entry, size)
        part = assemble._Part(index, shape, np.dtype(np.float32))
        pieces = list(assemble._pieces(stored, entry, size, {leaf: [part]}))
        return sum(assemble._fill(stored, entry, size, None, {leaf: [part]}, *piece) for piece in pieces)

    every = slice(None)
    whole = 2 * stored["model.layers.0.mlp.up_proj.weight"].nbytes
    assert bytes_read("mlp.up_proj.weight", (every, every, every)) == whole
    assert bytes_read("mlp.up_proj.weight", (slice(1, 2), every, every)) == whole // 2, "one layer"
    assert bytes_read("mlp.up_proj.weight", (every, every, slice(0, 6))) == whole // 4, "a quarter of the stored rows"
    assert bytes_read("mlp.up_proj.weight", (every, slice(0, 4), every)) == whole, "columns are read with their rows"
    heads = 2 * stored["model.layers.0.self_attn.q_proj.weight"].nbytes
    assert bytes_read("self_attn.q_proj.weight", (every, every, slice(1, 3), every)) == heads // 2, "two of four heads"


def test_several_processes_read_rows_and_exchange_columns(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(GQA, vocab_size=64, hidden_size=32, intermediate_size=64)
    convert.save(random_tree(config), config, tmp_path / "out")
    entries = {entry.row.name: entry for entry in tensors.entries(config)}
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    lies = flatten_dict(tree_shardings(transformer.logical_axes(config), layouts(mesh)["train"]), sep=".")

    def split(name: str, leaf: str) -> tuple:
        path, shape = next(
            (at, n) for at_leaf, at, n in tensors.leaves(entries[name], tensors.sizes(config)) if at_leaf == leaf
        )
        return tuple(assemble.by_rows(lies[path], entries[name], leaf, shape).spec)

    assert split("mlp.up_proj.weight", "mlp.up") == tuple(lies["dense.mlp.up"].spec), "alone it reads all rows anyway"
    monkeypatch.setattr(hosts, "count", lambda: 2)
    assert lies["dense.mlp.up"].spec == PartitionSpec(None, "fsdp", "tensor")
    assert split("mlp.up_proj.weight", "mlp.up") == (None, None, ("tensor", "fsdp"))
    assert split("mlp.down_proj.weight", "mlp.down") == (None, None, ("fsdp", "tensor"))
    assert split("self_attn.k_proj.weight", "attn.k") == tuple(lies["dense.attn.k"].spec), "two heads, eight devices"
    _, tree = convert.load(tmp_path / "out", mesh)
    assert_same(tree, random_tree(config))
    for path, leaf in flatten_dict(tree, sep=".").items():
        assert leaf.sharding.is_equivalent_to(lies[path], leaf.ndim), path


def test_the_host_holds_one_leaf_and_some_pieces(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    sizes = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
    config = dataclasses.replace(GQA, **sizes)
    size, flat = tensors.sizes(config), {}
    for entry in tensors.entries(config):
        flat |= {at: rng.random(shape, np.float32) for _, at, shape in tensors.leaves(entry, size)}
    convert.save(unflatten_dict(flat, sep="."), config, tmp_path / "out")
    largest = max(leaf.nbytes for leaf in flat.values())
    total = sum(leaf.nbytes for leaf in flat.values())
    monkeypatch.setattr(assemble, "PIECE_BYTES", 1 << 16)
    # Only numpy's memory is traced, so that the arrays have to leave it for it to be given back.
    put = jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda array, device: jax.block_until_ready(jnp.copy(put(array, device))))
    del flat
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    convert.load(tmp_path / "out", mesh)  # what jax compiles and remembers is no part of it
    tracemalloc.start()
    try:
        convert.load(tmp_path / "out", mesh)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total > 3 * largest
    assert peak < 1.3 * largest, f"{peak / largest:.2f} times the largest leaf"


def test_a_bucket_is_as_good_as_a_disk(tmp_path: pathlib.Path) -> None:
    convert.save(random_tree(DEEPSEEK), DEEPSEEK, tmp_path / "out", max_shard_bytes=20_000)
    fsspec.filesystem("memory").put(str(tmp_path / "out") + "/", "/models/tiny/", recursive=True)
    try:
        shown = []
        config, tree = convert.load("memory://models/tiny", progress=lambda done, total: shown.append((done, total)))
        assert config == DEEPSEEK
        assert_same(tree, random_tree(DEEPSEEK))
        assert [done for done, _ in shown] == sorted(done for done, _ in shown) and len({t for _, t in shown}) == 1
        assert shown[-1][0] == shown[-1][1]
        fsspec.filesystem("memory").rm("/models/tiny/model-00002-of-00004.safetensors")
        with pytest.raises(ValueError, match=r"memory://models/tiny lacks 1 of \d shards: model-00002-of"):
            convert.load("memory://models/tiny")
    finally:
        fsspec.filesystem("memory").rm("/models", recursive=True)
    with pytest.raises(ValueError, match="memory://models/gone does not exist"):
        convert.load("memory://models/gone")
    with pytest.raises(ValueError, match=r"nonsense://x cannot be opened: .*nonsense"):
        folder_at("nonsense://x")


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: pathlib.Path) -> None:
    convert.save(random_tree(GQA), GQA, tmp_path / "out")
    stored = safetensors_io.open_folder(tmp_path / "out")["lm_head.weight"]
    file = tmp_path / "out/model.safetensors"
    file.write_bytes(file.read_bytes()[: stored.start + 30])
    with pytest.raises(ValueError, match="model.safetensors ends .* bytes too early"):
        stored.read()


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_finite_is_what_numpy_says(dtype: object) -> None:
    bits = np.dtype(f"u{np.dtype(dtype).itemsize}")
    rng = np.random.default_rng(0)
    values = rng.integers(0, np.iinfo(bits).max, 4000, bits, endpoint=True)
    for one in values.view(dtype):
        assert assemble.is_finite(np.array([1, one], dtype)) == math.isfinite(float(one))
    assert assemble.is_finite(np.empty((0, 3), dtype))


def test_nan_in_fp8_weights_or_scales_is_named(tmp_path: pathlib.Path) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    for where, says in ((name, f"{name} holds NaN"), (name + "_scale_inv", f"{name} holds NaN")):
        folder = tmp_path / where
        convert.save(random_tree(DEEPSEEK), DEEPSEEK, folder, block=(4, 3), dtype=ml_dtypes.bfloat16)
        convert.load(folder)
        edit(folder, lambda held, where=where: held[where].__setitem__((0, 0), np.nan))
        with pytest.raises(ValueError, match=says):
            convert.load(folder)
