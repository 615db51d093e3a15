"""Bad model folders and bad exports: each mistake is named before training, and nothing half-written is left behind."""

import dataclasses
import json
import pathlib
import resource
import shutil
from collections.abc import Callable
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from folders import DEEPSEEK, edit, random_tree

from r1jax.model import convert
from r1jax.model.families import config_to_hf


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A saved DEEPSEEK model in one file."""
    convert.save(random_tree(DEEPSEEK), DEEPSEEK, tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder: pathlib.Path, **fields: object) -> None:
    """Changes fields of config.json; None takes one away."""
    hf = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({k: v for k, v in hf.items() if v is not None}))


def shorten(file: pathlib.Path, to: int) -> None:
    """Cuts a file."""
    file.write_bytes(file.read_bytes()[:to])


def pickled(folder: pathlib.Path) -> None:
    """Leaves only a pickle."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def spoil_header(folder: pathlib.Path) -> None:
    """Moves a tensor's offsets."""
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    start = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + start].replace(b'"data_offsets":[0,', b'"data_offsets":[4,')
    file.write_bytes(raw[:8] + header + raw[8 + start :])


NORM = "model.norm.weight"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
# Each entry spoils a good folder and says what the error must name.
BAD_FOLDERS = {
    "no folder": (lambda f: shutil.rmtree(f), "does not exist"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
    "pickles only": (pickled, "pytorch_model.bin.*convert them to safetensors"),
    "truncated data": (lambda f: shorten(f / "model.safetensors", -7), "model.safetensors is truncated"),
    "truncated header": (lambda f: shorten(f / "model.safetensors", 100), "model.safetensors is truncated"),
    "empty file": (lambda f: shorten(f / "model.safetensors", 0), "model.safetensors is truncated"),
    "altered header": (spoil_header, "the header places"),
    "missing tensor": (lambda f: edit(f, lambda t: t.pop(EXPERT)), f"lacks 1 tensors .*{EXPERT}"),
    "unexpected tensor": (lambda f: edit(f, lambda t: t.update(x=t[NORM])), "no place for: x"),
    "wrong shape": (lambda f: edit(f, lambda t: t.update({EXPERT: t[EXPERT].T})), rf"{EXPERT} has shape \(16, 4\)"),
    "wrong dtype": (lambda f: edit(f, lambda t: t.update({NORM: t[NORM].astype(np.int64)})), f"{NORM} is I64"),
    "NaN": (lambda f: edit(f, lambda t: t[EXPERT].__setitem__((1, 2), np.nan)), f"{EXPERT} holds NaN"),
    "MTP copy differs": (
        lambda f: edit(f, lambda t: t["model.layers.3.embed_tokens.weight"].__setitem__((1, 2), 0)),
        "model.layers.3.embed_tokens.weight must repeat model.embed_tokens.weight",
    ),
    "FP8 unannounced": (
        lambda f: edit(f, lambda t: t.update({EXPERT: t[EXPERT].astype(ml_dtypes.float8_e4m3fn)})),
        f"{EXPERT} is FP8, but config.json has no quantization_config",
    ),
    "other quantisation": (lambda f: edit_config(f, quantization_config={"quant_method": "awq"}), "awq.*reads"),
    "unknown kind": (
        lambda f: edit_config(f, model_type="mamba"),
        "'mamba'; r1jax reads deepseek_v3, deepseek_v2, qwen2",
    ),
    "unknown field": (lambda f: edit_config(f, logit_cap=30.0), "logit_cap = 30.0, which r1jax does not know"),
    "missing field": (lambda f: edit_config(f, kv_lora_rank=None), "lacks kv_lora_rank"),
    "unsupported value": (lambda f: edit_config(f, attention_bias=True), "attention_bias = True; r1jax computes only"),
    "two MTP layers": (lambda f: edit_config(f, num_nextn_predict_layers=2), "num_nextn_predict_layers = 2"),
    "unknown rope": (lambda f: edit_config(f, rope_scaling={"type": "longrope"}), "rope_type 'longrope'"),
    "unknown rope field": (
        lambda f: edit_config(f, rope_scaling={"type": "linear", "factor": 2, "x": 1}),
        r"rope fields \['x'\]",
    ),
    "missing rope field": (lambda f: edit_config(f, rope_scaling={"type": "linear"}), "lacks factor"),
    "no theta": (lambda f: edit_config(f, rope_theta=None), "lacks rope_theta"),
}


@pytest.mark.parametrize(("spoil", "says"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_bad_folder(folder: pathlib.Path, spoil: Callable, says: str) -> None:
    spoil(folder)
    with pytest.raises(ValueError, match=says):
        convert.load(folder)


def reindex(folder: pathlib.Path, change: Callable[[dict], object]) -> None:
    """Changes the index of a sharded folder."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    change(index)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


SECOND = "model-00002-of-00003.safetensors"
BAD_SHARDS = {
    "missing shard": (lambda f: (f / SECOND).unlink(), f"lacks 1 of 3 shards: {SECOND}"),
    "truncated shard": (lambda f: shorten(f / SECOND, -1), f"{SECOND} is truncated"),
    "index names what is absent": (
        lambda f: reindex(f, lambda i: i["weight_map"].update(y=SECOND)),
        "names tensors that their shards do not hold: y",
    ),
    "index leaves a tensor out": (
        lambda f: reindex(f, lambda i: i["weight_map"].pop(NORM)),
        f"shards hold tensors that .* does not place there: {NORM}",
    ),
    "index points outside": (lambda f: reindex(f, lambda i: i["weight_map"].update(y="../z")), "'../z', which is not"),
    "index without a map": (lambda f: reindex(f, lambda i: i.pop("weight_map")), "has no weight_map"),
}


@pytest.mark.parametrize(("spoil", "says"), BAD_SHARDS.values(), ids=BAD_SHARDS)
def test_bad_shards(tmp_path: pathlib.Path, spoil: Callable, says: str) -> None:
    tree = random_tree(DEEPSEEK)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    convert.save(tree, DEEPSEEK, tmp_path / "out", max_shard_bytes=total // 2)
    assert (tmp_path / "out" / SECOND).is_file()
    spoil(tmp_path / "out")
    with pytest.raises(ValueError, match=says):
        convert.load(tmp_path / "out")


# Bad exports leave nothing under the final name.


def test_an_existing_folder_is_refused(folder: pathlib.Path) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        convert.save(random_tree(DEEPSEEK, seed=1), DEEPSEEK, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_failed_save_leaves_nothing(tmp_path: pathlib.Path) -> None:
    # The limit on a file's size makes the system refuse the third shard's bytes as a full disk would.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    tree = random_tree(DEEPSEEK)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"{tmp_path / 'out'} could not be written: File too large"):
            convert.save(tree, DEEPSEEK, tmp_path / "out", max_shard_bytes=30_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_small_disk_is_named_before_writing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5))
    with pytest.raises(OSError, match="has 5 bytes free, the model needs"):
        convert.save(random_tree(DEEPSEEK), DEEPSEEK, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_tree_of_another_config_is_refused(tmp_path: pathlib.Path) -> None:
    tree = random_tree(DEEPSEEK)
    with pytest.raises(ValueError, match="unexpected leaves .'mtp"):
        convert.save(tree, dataclasses.replace(DEEPSEEK, num_nextn_predict_layers=0), tmp_path / "out")
    with pytest.raises(ValueError, match=r"leaf embed is \(40, 16\)"):
        convert.save(tree, dataclasses.replace(DEEPSEEK, vocab_size=41), tmp_path / "out")


def test_an_extra_file_cannot_replace_the_model(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="would replace what is exported"):
        convert.save(random_tree(DEEPSEEK), DEEPSEEK, tmp_path / "out", {"config.json": b"{}"})
    assert not (tmp_path / "out").exists()


def test_a_model_of_no_family_names_what_differs() -> None:
    with pytest.raises(ValueError, match="deepseek_v3 differs in router_bias = False"):
        config_to_hf(dataclasses.replace(DEEPSEEK, router_bias=False))
