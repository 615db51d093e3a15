"""A checkpoint is whole, sound and the one asked for, or there is an error that says what to do."""

import itertools
import multiprocessing
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import threading
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from r1jax import hosts
from r1jax.checkpoint import Checkpoints, latest_step

# Children of a fork server start in a tenth of a second, with orbax imported and no jax backend yet.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["r1jax.checkpoint", "pytest"])

HOST = {"cursor": [3, 7], "schedule": {"max_completion_tokens": 64}, "lr": 0.1 + 0.2}


class Adam(NamedTuple):
    count: jax.Array
    mu: dict


def tree(seed: int = 0, scale: int = 1) -> dict:
    """A state with every kind of leaf and container a stage saves."""
    bits = np.random.default_rng(seed).integers(0, 2**32, (16 * scale, 8), np.uint32)
    return {
        # Random bits hold NaNs with payloads, infinities, subnormals and negative zeros.
        "policy": {
            "embed": jnp.asarray(bits.view(np.float32)),
            "layers": [{"q": jnp.asarray(bits).view(jnp.bfloat16)}],
        },
        "optimizer": (Adam(jnp.int32(seed), {"embed": jnp.asarray(bits[::2])}), None),
        "mask": jnp.asarray(bits[0] % 2 == 0),
        "step": jnp.uint32(seed),
    }


def shapes(of: dict, sharding: jax.sharding.Sharding | None = None) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), of)


def assert_same(a: dict, b: dict) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape, path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


@pytest.fixture
def opened():
    """Opens `Checkpoints` and closes them after the test."""
    stack = []

    def open_(folder, **options):
        stack.append(Checkpoints(folder, **{"save_every": 1, "keep": 3, **options}))
        return stack[-1]

    yield open_
    for one in stack:
        one.close()


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A folder with sound checkpoints of steps 1, 2 and 3, to be copied."""
    folder = tmp_path_factory.mktemp("sound") / "zero"
    saved = Checkpoints(folder, save_every=1, keep=3)
    for step in (1, 2, 3):
        saved.save(step, tree(step), {**HOST, "n": step})
    saved.close()
    return folder


@pytest.fixture
def copy(three, tmp_path):
    return pathlib.Path(shutil.copytree(three, tmp_path / "zero"))


def test_restores_every_bit(opened, three):
    c = opened(three)
    assert c.steps() == [1, 2, 3] and c.latest() == 3
    for step in c.steps():
        restored, host = c.restore(step, shapes(tree()))
        assert_same(restored, tree(step))
        assert host == {**HOST, "n": step}


def test_saves_the_state_of_the_call_whatever_happens_after(opened, tmp_path):
    c = opened(tmp_path)
    update = jax.jit(lambda t: jax.tree.map(lambda x: ~x if x.dtype == bool else x + 1, t), donate_argnums=0)
    state, host = tree(scale=2000), {"n": [0]}
    c.save(1, state, host)
    host["n"][0] = 1
    for _ in range(5):
        state = update(state)
    jax.block_until_ready(state)
    restored, restored_host = c.restore(1, shapes(state))
    assert_same(restored, tree(scale=2000))
    assert restored_host == {"n": [0]}


def test_save_returns_before_the_checkpoint_exists(opened, tmp_path, monkeypatch):
    c, may_go_on = opened(tmp_path), threading.Event()
    write = hosts.atomic_write
    monkeypatch.setattr(hosts, "atomic_write", lambda *args: (may_go_on.wait(10), write(*args)))
    c.save(1, tree(), {})
    assert c.latest() is None
    may_go_on.set()
    c.wait()
    assert c.latest() == 1


def test_a_run_that_fails_keeps_the_save_under_way(tmp_path):
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path, save_every=1, keep=1) as c:
        c.save(1, tree(scale=1000), {})
        1 / 0  # noqa: B018
    assert latest_step(tmp_path) == 1


def test_a_step_is_saved_once(opened, copy):
    c = opened(copy)
    c.save(3, tree(9), {})
    c.wait()
    assert_same(c.restore(3, shapes(tree()))[0], tree(3))


def test_a_part_can_be_restored_alone(opened, three):
    restored, _ = opened(three).restore(2, {"policy": shapes(tree())["policy"]})
    assert_same(restored, {"policy": tree(2)["policy"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["policy"].pop("embed"), r"policy\.embed is float32\[16,8\] there, wanted without it"),
        (lambda t: t["policy"].update(head=t["mask"]), r"policy\.head is not there, wanted bool\[8\]"),
        (lambda t: t.update(reference=t["mask"]), r"reference is not there, wanted bool\[8\]"),
        (
            lambda t: t["policy"].update(embed=jax.ShapeDtypeStruct((8, 16), jnp.float32)),
            r"policy\.embed is float32\[16,8\] there, wanted float32\[8,16\]",
        ),
        (lambda t: t.update(step=jax.ShapeDtypeStruct((), jnp.int32)), r"step is uint32\[\] there, wanted int32\[\]"),
    ],
)
def test_another_structure_names_the_first_difference(opened, three, change, message):
    like = shapes(tree())
    change(like)
    with pytest.raises(ValueError, match=message) as error:
        opened(three).restore(1, like)
    assert "config.model" in str(error.value) and str(three / "1") in str(error.value)


def damages():
    return {
        "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
        "emptied": lambda path: os.truncate(path, 0),
        "missing": lambda path: path.unlink(),
        "flipped bit": lambda path: path.write_bytes(flip(path.read_bytes())),
    }


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", damages())
def test_any_damaged_file_is_named_with_the_way_out(opened, copy, damage):
    files = sorted(path.relative_to(copy / "3") for path in (copy / "3").rglob("*") if path.is_file())
    assert len(files) > 5
    c = opened(copy)
    for name in files:
        if name.parent == pathlib.Path() and damage == "missing":
            continue  # without its manifest it is no checkpoint: see the next test
        path = copy / "3" / name
        before = path.read_bytes()
        damages()[damage](path)
        with pytest.raises(ValueError, match=r"last good one is step 2; to continue from it, delete \S+/3$") as error:
            c.restore(3, shapes(tree()))
        assert str(path) in str(error.value)
        if damage == "cut" and name.parent != pathlib.Path():
            assert f"{len(before) // 2} bytes, wanted {len(before)}" in str(error.value)
        path.write_bytes(before)
    assert_same(c.restore(3, shapes(tree()))[0], tree(3))


def test_without_a_manifest_there_is_no_checkpoint(opened, copy):
    next((copy / "3").glob("manifest*")).unlink()
    assert opened(copy).latest() == 2


def test_the_way_out_skips_what_is_damaged_as_well(opened, copy):
    for step in "23":
        (copy / step / "arrays" / "manifest.ocdbt").unlink()
    with pytest.raises(ValueError, match=rf"last good one is step 1; .* delete {copy}/3 {copy}/2$"):
        opened(copy).restore(3, shapes(tree()))
    (copy / "1" / "arrays" / "manifest.ocdbt").unlink()
    with pytest.raises(ValueError, match=f"No older one is good; .* delete {copy}$"):
        opened(copy).restore(3, shapes(tree()))


def test_what_is_not_there(opened, three, tmp_path):
    with pytest.raises(ValueError, match=r"step 4 .* it holds steps 1, 2, 3; check --workdir"):
        opened(three).restore(4, shapes(tree()))
    nowhere = opened(tmp_path / "nowhere")
    assert nowhere.latest() is None
    with pytest.raises(ValueError, match="there is no such folder"):
        nowhere.restore(1, shapes(tree()))
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("wrong", [{"save_every": 0}, {"keep": 0}, {"keep_every": -1}])
def test_impossible_retention_names_the_key(tmp_path, wrong):
    with pytest.raises(ValueError, match=rf"config\.checkpoint\.{next(iter(wrong))} = "):
        Checkpoints(tmp_path, **{"save_every": 1, "keep": 1, **wrong})


def test_a_url_is_refused_rather_than_made_a_folder():
    with pytest.raises(ValueError, match="mounted folder"):
        Checkpoints("gs://bucket/run", save_every=1, keep=1)


def test_keeps_the_last_and_every_nth(opened, tmp_path):
    c = opened(tmp_path, save_every=2, keep=2, keep_every=4)
    assert [step for step in range(1, 7) if c.due(step)] == [2, 4, 6]
    for step in range(2, 12, 2):
        c.save(step, {"step": jnp.int32(step)}, {})
    c.wait()
    assert c.steps() == [4, 8, 10]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "4", "8"]


def test_a_reader_deletes_nothing(copy):
    (copy / "7").mkdir()  # another process is saving
    with Checkpoints(copy, save_every=1, keep=1) as c:
        c.restore(2, shapes(tree()))
    assert sorted(path.name for path in copy.iterdir()) == ["1", "2", "3", "7"]


def test_half_a_deletion_leaves_nothing_that_looks_whole(opened, copy, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path: (path / "arrays" / "manifest.ocdbt").unlink())
        c = opened(copy, keep=2)
        c.save(4, tree(4), {})
        c.wait()
        assert c.steps() == [3, 4] and (copy / "2").exists()
    c.save(5, tree(5), {})
    c.wait()
    assert c.steps() == [4, 5] and not (copy / "2").exists()


def test_no_room_is_said_before_anything_is_written(opened, copy, monkeypatch):
    c = opened(copy)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 100))
    with pytest.raises(OSError, match=r"step 4 .*0\.000 GB are free.*from step 3.*config\.checkpoint\.keep = 3"):
        c.save(4, tree(4), {})
    assert c.steps() == [1, 2, 3] and not (copy / "4").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's, of the write it gave up
def test_a_write_that_fails_is_raised_and_harms_nothing(opened, copy, caplog):
    c = opened(copy)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # as a quota would
    try:
        with pytest.raises(OSError, match=r"step 4 could not be written .*File too large.*continue from step 3"):
            c.save(4, tree(4, scale=1000), {})
            c.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not caplog.records
    c.wait()  # told once
    assert c.steps() == [1, 2, 3]
    c.save(5, tree(5), {})
    assert_same(c.restore(5, shapes(tree()))[0], tree(5))
    assert not (copy / "4").exists()


def test_an_unwritable_folder_is_told(opened, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="could not be written"):
        opened(tmp_path / "file").save(1, tree(), {})


def big(step: int) -> dict:
    return {"w": jnp.full((64, 1024), step, jnp.float32), "step": jnp.int32(step)}


def save_until_killed(folder: str, changes: int | None) -> None:
    """Saves step after step, deleting the one before; dies just before the given change of the file system."""
    c = Checkpoints(folder, save_every=1, keep=1)
    step = (c.latest() or 0) + 1
    c.save(step, big(step), {"step": step})
    c.wait()
    left = itertools.count(-1 if changes is None else changes, -1)

    def count_down(event: str, _: object) -> None:
        if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count_down)
    while True:
        step += 1
        c.save(step, big(step), {"step": step})


def test_killed_at_any_moment_the_last_checkpoint_is_sound(opened, tmp_path):
    rng = random.Random(0)
    last = 0
    # Counted: arrays half written (2, 6), before the manifest (8), old one still there (9), half deleted (10, 20).
    # Random: also while orbax writes in C++.
    for changes in (2, 6, 8, 9, 10, 20, None, None, None):
        child = PROCESSES.Process(target=save_until_killed, args=(str(tmp_path), changes))
        child.start()
        if changes is None:
            while not any(int(p.name) > last for p in tmp_path.iterdir() if p.name.isdigit()):
                time.sleep(0.01)
            time.sleep(rng.uniform(0.1, 0.5))
            child.kill()
        child.join(300)
        assert child.exitcode == -signal.SIGKILL
        c = opened(tmp_path)
        assert c.latest() >= last + (changes is not None)
        for step in c.steps():
            restored, host = c.restore(step, shapes(big(0)))
            assert_same(restored, big(step))
            assert host == {"step": step}
        last = c.latest()


def on_mesh(n_devices: int, spec: PartitionSpec, task: str, folder: str) -> None:
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={n_devices}"
    assert jax.device_count() == n_devices
    mesh = jax.make_mesh((max(n_devices // 2, 1), min(n_devices, 2)), ("data", "tensor"))
    shardings = {name: NamedSharding(mesh, spec if leaf.ndim else PartitionSpec()) for name, leaf in big(0).items()}
    c = Checkpoints(folder, save_every=1, keep=1)
    if task == "save":
        c.save(7, jax.tree.map(jax.device_put, big(7), shardings), {})
    else:
        like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), big(0), shardings)
        restored, _ = c.restore(7, like)
        assert_same(restored, big(7))
        assert jax.tree.map(lambda x: x.sharding, restored) == shardings
    c.close()


@pytest.mark.parametrize("there_and_back", [(1, 8), (8, 1), (8, 2)])
def test_restores_onto_another_mesh(tmp_path, there_and_back):
    spec = PartitionSpec("data", "tensor")
    for n_devices, task in zip(there_and_back, ("save", "restore"), strict=True):
        child = PROCESSES.Process(target=on_mesh, args=(n_devices, spec, task, str(tmp_path)))
        child.start()
        child.join(300)
        assert child.exitcode == 0


def test_restores_onto_another_layout_of_the_same_devices(opened, tmp_path):
    if jax.device_count() < 8:
        pytest.skip("wants 8 simulated devices")
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    c = opened(tmp_path)
    value = jnp.arange(64.0 * 32).reshape(64, 32)
    c.save(1, {"w": jax.device_put(value, NamedSharding(mesh, PartitionSpec("data", None)))}, {})
    for spec in (PartitionSpec("tensor", "data"), PartitionSpec(None, ("data", "tensor")), PartitionSpec()):
        sharding = NamedSharding(mesh, spec)
        restored, _ = c.restore(1, shapes({"w": value}, sharding))
        assert_same(restored, {"w": value})
        assert restored["w"].sharding == sharding


def test_what_cannot_be_saved_exactly_is_refused(opened, tmp_path):
    c = opened(tmp_path)
    for bad in ({"w": 1.0}, {"key": jax.random.key(0)}):
        with pytest.raises(AssertionError):
            c.save(1, bad, {})
    with pytest.raises(AssertionError, match="JSON"):
        c.save(1, tree(), {"cursor": (1, 2)})
