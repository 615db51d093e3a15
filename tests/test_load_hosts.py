"""Two processes that load one released folder, and write it: each its own part, together the whole model."""

import dataclasses
import json
import multiprocessing
import os
import pathlib
import socket
import time

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from folders import DEEPSEEK, GQA, random_tree

from r1jax import hosts
from r1jax.folders import Folder
from r1jax.model import assemble, convert, safetensors_io
from r1jax.model.config import ModelConfig
from r1jax.sharding import make_mesh

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["r1jax.model.convert", "pytest"])

DENSE = dataclasses.replace(GQA, vocab_size=64, hidden_size=32, intermediate_size=64, num_key_value_heads=4, head_dim=8)
ROUTED = dataclasses.replace(
    DEEPSEEK, vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, v_head_dim=8
)


def one_of_two(index: int, port: int, folder: str, config: ModelConfig, mesh: dict[str, int]) -> None:
    del os.environ["XLA_FLAGS"]
    os.environ |= {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(index),
    }
    hosts.initialize(cpu_devices=2)
    spans, read_into = [], Folder.read_into

    def counted(at: Folder, file: str, start: int, out: np.ndarray) -> None:
        spans.append((start, start + len(out)))
        read_into(at, file, start, out)

    Folder.read_into, assemble.PIECE_BYTES = counted, 512
    found, tree = convert.load(folder, make_mesh(mesh))
    assert found == config and hosts.count() == 2
    want = flatten_dict(random_tree(config), sep=".")
    for path, leaf in flatten_dict(tree, sep=".").items():
        assert not leaf.is_fully_addressable
        np.testing.assert_array_equal(hosts.fetch(leaf), want[path], err_msg=path)
    pathlib.Path(folder, f"read-{index}.json").write_text(json.dumps(spans))
    written, write = [], safetensors_io._write_file
    safetensors_io._write_file = lambda file, tensors: (written.append(file.name), write(file, tensors))
    convert.save(random_tree(config), config, f"{folder}/again", max_shard_bytes=20_000)
    again = flatten_dict(convert.load(f"{folder}/again", make_mesh(mesh))[1], sep=".")
    for path, leaf in again.items():
        np.testing.assert_array_equal(hosts.fetch(leaf), want[path], err_msg=path)
    pathlib.Path(folder, f"wrote-{index}.json").write_text(json.dumps(written))
    jax.distributed.shutdown()  # jax does it at exit, which multiprocessing skips


@pytest.mark.parametrize(
    ("config", "mesh"),
    [(DENSE, {"fsdp": 4}), (DENSE, {"tensor": 4}), (ROUTED, {"fsdp": 2, "expert": 2})],
    ids=["fsdp", "tensor", "experts"],
)
def test_each_of_two_processes_reads_its_own_bytes(config: ModelConfig, mesh: dict, tmp_path: pathlib.Path) -> None:
    convert.save(random_tree(config), config, tmp_path)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    given = (port, str(tmp_path), config, mesh)
    children = [PROCESSES.Process(target=one_of_two, args=(i, *given)) for i in range(2)]
    for child in children:
        child.start()
    give_up_s = time.monotonic() + 300
    while {child.exitcode for child in children} in ({None}, {0, None}) and time.monotonic() < give_up_s:
        time.sleep(0.05)
    for child in children:  # one that fails leaves the other waiting
        child.kill()
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    wrote = [json.loads((tmp_path / f"wrote-{index}.json").read_text()) for index in range(2)]
    assert sorted(wrote[0] + wrote[1]) == sorted(path.name for path in (tmp_path / "again").glob("*.safetensors"))
    assert abs(len(wrote[0]) - len(wrote[1])) < 2 <= len(wrote[0])
    # How often each process read each byte of the file.
    reads = np.zeros((2, (tmp_path / "model.safetensors").stat().st_size), np.uint8)
    for index in range(2):
        for start, stop in json.loads((tmp_path / f"read-{index}.json").read_text()):
            reads[index, start:stop] += 1
    twice, total = 0, 0
    for name, tensor in safetensors_io.open_folder(tmp_path).items():
        mine = reads[:, tensor.start : tensor.start + tensor.nbytes]
        repeated = name.endswith(("embed_tokens.weight", "shared_head.head.weight", "lm_head.weight"))
        most = 2 if repeated and config.num_nextn_predict_layers else 1  # read, and compared with its copy
        assert mine.sum(0).min() > 0 and mine.max() <= most, name
        total, twice = total + tensor.nbytes, twice + int(mine.all(0).sum())
    # What is small lies on every device: norms, router biases and, by experts, what attention has.
    assert twice < total * (0.35 if "expert" in mesh else 0.02), f"{twice / total:.1%} of the bytes were read by both"
