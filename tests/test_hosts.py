"""One process is the identity of every collective; two processes see the same values in the same order."""

import multiprocessing
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from r1jax import hosts, main, pipeline
from r1jax.checkpoint import Checkpoints

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["r1jax.checkpoint", "pytest"])


def test_one_process_is_the_identity():
    hosts.initialize()
    assert (hosts.index(), hosts.count(), hosts.is_writer()) == (0, 1, True)
    assert hosts.gather({"a": 1}) == [{"a": 1}]
    assert hosts.sum_across(2**40) == 2**40
    assert hosts.agree([1, "x"]) == [1, "x"]
    assert hosts.any_across(True) and not hosts.any_across(False)
    assert hosts.my_part("abc") == "abc"
    stop = hosts.Stop()
    assert not stop.is_agreed()
    stop.requested = True
    assert stop.is_agreed()
    with pytest.raises(KeyError), hosts.together({"x": 1}, (ValueError,), InterruptedError):
        raise KeyError  # of nobody's business but its own


def test_parts_are_disjoint_and_cover(monkeypatch):
    monkeypatch.setattr(hosts, "count", lambda: 4)
    parts = []
    for i in range(4):
        monkeypatch.setattr(hosts, "index", lambda i=i: i)
        parts += hosts.my_part(range(10))
    assert sorted(parts) == list(range(10))


def test_fetch_outlives_donation_and_put_is_its_inverse():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows = np.arange(jax.device_count() * 6, dtype=np.float32).reshape(-1, 3)
    shardings = {"x": NamedSharding(mesh, PartitionSpec("data")), "y": NamedSharding(mesh, PartitionSpec())}
    placed = hosts.put({"x": rows, "y": rows}, shardings)
    assert {name: array.sharding for name, array in placed.items()} == shardings
    copies = jax.tree.map(hosts.fetch, placed)
    jax.block_until_ready(jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)(placed))
    for copy in copies.values():
        assert copy.flags.writeable and np.array_equal(copy, rows)
    assert np.array_equal(hosts.fetch(hosts.put(rows, shardings["x"])), rows)


def test_a_coordinator_without_numbers_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES='two'"):
        hosts.initialize()


COUNT, LEVEL = "--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level"


@pytest.mark.parametrize(
    ("chips", "platforms", "before", "after"),
    [
        ((), "", COUNT, f"{COUNT} {LEVEL}=1"),
        ((), "", f"{COUNT} {LEVEL}=3", f"{COUNT} {LEVEL}=3"),
        (("/dev/nvidia0",), "", COUNT, COUNT),
        (("/dev/nvidia0",), "cpu", COUNT, f"{COUNT} {LEVEL}=1"),
    ],
)
def test_only_cpu_code_is_compiled_at_a_lower_level(monkeypatch, chips, platforms, before, after):
    monkeypatch.setattr(hosts.glob, "glob", lambda pattern: [c for c in chips if c.startswith(pattern.split("[")[0])])
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setenv("XLA_FLAGS", before)
    hosts.initialize()
    assert os.environ["XLA_FLAGS"] == after


def test_first_signal_asks_second_interrupt_ends(capfd):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        stop = hosts.on_sigterm()
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler that repeats itself does not cut the saving short
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        stop = hosts.on_sigterm()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert "SIGTERM: stopping after this step" in capfd.readouterr().err


def test_peak_memory_counts_children_once():
    if not pathlib.Path("/proc/self/status").exists():
        pytest.skip("no /proc on this system")
    before = hosts.peak_rss_gb()
    take = "import sys; x = bytearray(b'1' * 150_000_000); print('ready', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", take], stdin=-1, stdout=-1) as child:
        assert child.stdout.readline() == b"ready\n"
        during = hosts.peak_rss_gb()
        child.stdin.close()
    assert before + 0.15 < during < before + 0.4
    # A child that starts from this process's memory by fork does not bring its parent's peak along.
    subprocess.run([sys.executable, "-c", ""], check=True)
    assert hosts.peak_rss_gb() < before + 0.1


def test_atomic_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.json"
    hosts.atomic_write(path, "é")
    assert path.read_bytes() == "é".encode()
    hosts.atomic_write(path, b"\x00")
    assert path.read_bytes() == b"\x00"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space"):
            hosts.atomic_write(path, b"\x01")
    assert path.read_bytes() == b"\x00"
    hosts.atomic_write(path, b"\x02")
    assert [file.name for file in path.parent.iterdir()] == ["file.json"]


def begin(index: int, port: int) -> None:
    """Makes this process one host of two, with two devices."""
    del os.environ["XLA_FLAGS"]
    os.environ |= {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(index),
    }
    hosts.initialize(cpu_devices=2)


def exit_codes(function: Callable, *given: object) -> list[int]:
    """How two processes end that call `function` with their index, a port and what is given."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    children = [PROCESSES.Process(target=function, args=(i, port, *given)) for i in range(2)]
    for child in children:
        child.start()
    give_up_s = time.monotonic() + 300
    while {child.exitcode for child in children} in ({None}, {0, None}) and time.monotonic() < give_up_s:
        time.sleep(0.05)
    for child in children:  # one that fails may leave the other waiting
        child.join(10)
        child.kill()
        child.join()
    return [child.exitcode for child in children]


def one_of_two(index: int, port: int, folder: str) -> None:
    begin(index, port)
    hosts.initialize()  # harmless
    assert (hosts.index(), hosts.count(), hosts.is_writer()) == (index, 2, index == 0)

    assert hosts.gather({"host": index, "long": "x" * index * 2000}) == [
        {"host": 0, "long": ""},
        {"host": 1, "long": "x" * 2000},
    ]
    assert hosts.sum_across(2**53 + index) == 2**54 + 1
    assert hosts.agree(index) == 0
    assert hosts.any_across(index == 1) and not hosts.any_across(False)
    assert hosts.Stop(requested=index == 1).is_agreed() and not hosts.Stop().is_agreed()

    rows = np.arange(8.0, dtype=np.float32).reshape(4, 2)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spread, everywhere = NamedSharding(mesh, PartitionSpec("data", "tensor")), NamedSharding(mesh, PartitionSpec())
    mine = hosts.put(rows, NamedSharding(mesh, PartitionSpec("data")))
    assert mine.shape == (4, 2) and {shard.data.shape for shard in mine.addressable_shards} == {(2, 2)}
    assert np.array_equal(hosts.fetch(mine), rows)
    assert np.array_equal(hosts.fetch(hosts.put(rows, everywhere)), rows)
    state = {"w": jax.jit(lambda x: x, out_shardings=spread)(mine), "step": hosts.put(np.int32(3), everywhere)}

    checkpoints = Checkpoints(folder, save_every=1, keep=1)
    assert checkpoints.latest() is None
    checkpoints.save(2, state, {"cursor": 2})
    checkpoints.save(3, state, {"cursor": 3})
    checkpoints.wait()
    assert checkpoints.latest() == 3
    like = {"w": jax.ShapeDtypeStruct((4, 2), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("tensor")))}
    restored, host = checkpoints.restore(3, like)
    assert host == {"cursor": 3} and np.array_equal(hosts.fetch(restored["w"]), rows)
    checkpoints.close()
    jax.distributed.shutdown()  # jax does it at exit, which multiprocessing skips


@pytest.mark.parametrize(
    ("error", "may_pass"),
    [
        (jax.errors.JaxRuntimeError("INTERNAL: the accelerator halted"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory while trying to allocate"), False),
        (ValueError("of its own"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_a_devices_failure_may_pass_and_errors_come_again(error, may_pass):
    assert hosts.may_pass(error) == may_pass


@pytest.mark.parametrize(("text", "code"), [("INTERNAL: the accelerator halted", 75), ("RESOURCE_EXHAUSTED: of", None)])
def test_the_command_asks_for_another_try_where_a_device_failed(monkeypatch, text, code):
    def fail(*given: object) -> None:
        raise jax.errors.JaxRuntimeError(text)

    monkeypatch.setattr(main, "_CONFIG", types.SimpleNamespace(value=ConfigDict({"cpu_devices": 1})))
    monkeypatch.setattr(main, "_WORKDIR", types.SimpleNamespace(value="nowhere"))
    monkeypatch.setattr(pipeline, "execute", fail)
    with pytest.raises(SystemExit if code else jax.errors.JaxRuntimeError) as ended:
        main.main([])
    assert getattr(ended.value, "code", None) == code


def fails_beside_another(index: int, port: int, errors: list[Exception | None]) -> None:
    begin(index, port)
    with hosts.together({}, (ValueError,), InterruptedError):
        if errors[index]:
            raise errors[index]
        time.sleep(60)


@pytest.mark.parametrize(
    ("errors", "code"),
    [
        ([None, ValueError("of its own")], 1),
        ([ValueError("of its own"), None], 1),
        ([None, jax.errors.JaxRuntimeError("INTERNAL: the accelerator halted")], hosts.TRY_AGAIN),
    ],
)
def test_all_hosts_end_with_one_code(errors, code):
    assert exit_codes(fails_beside_another, errors) == [code] * 2


def test_two_processes_act_as_one(tmp_path):
    assert exit_codes(one_of_two, str(tmp_path)) == [0, 0]
    # What two processes saved, one restores, and it knows when a part by the other is missing.
    alone = Checkpoints(tmp_path, save_every=1, keep=1)
    like = {"w": jax.ShapeDtypeStruct((4, 2), jnp.float32), "step": jax.ShapeDtypeStruct((), jnp.int32)}
    restored, _ = alone.restore(3, like)
    assert np.array_equal(restored["w"], np.arange(8.0).reshape(4, 2)) and restored["step"] == 3
    (tmp_path / "3" / "manifest-00001-of-00002.json").unlink()
    assert alone.latest() is None
    alone.close()
