"""Laws of moments and reference in host memory: they lie there, every bit of the run stays what it was, and
checkpoints go from one setting to the other."""

import contextlib
import itertools
import json
from unittest import mock

import jax
import pytest
from tiny_run import STAGE, execute, make_config, make_policy, metrics, outcome, quick_compilation

from r1jax import checkpoint, hosts, pipeline, rollout, sharding
from r1jax.run import Stopped

HOST = {"optim__moments_on": "host", "rl__reference_on": "host"}
KIND = sharding.MEMORIES["host"]


@contextlib.contextmanager
def seen_memories():
    """Collects in which memory each part of a training state lies when it is saved or restored, counts left out."""
    found, save, restore = {}, checkpoint.Checkpoints.save, checkpoint.Checkpoints.restore

    def look(tree):
        for path, a in jax.tree_util.tree_leaves_with_path(tree):
            if a.ndim:
                found.setdefault(path[0].key, set()).add(a.sharding.memory_kind)

    def saving(self, step, tree, host):
        look(tree)
        save(self, step, tree, host)

    def restoring(self, step, like):
        restored = restore(self, step, like)
        look(restored[0])
        return restored

    with mock.patch.multiple(checkpoint.Checkpoints, save=saving, restore=restoring):
        yield found


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "policy"
    make_policy(folder)
    return folder


@pytest.fixture(scope="module")
def straight(policy, tmp_path_factory):
    """The folder of a run on the devices alone."""
    workdir = tmp_path_factory.mktemp("straight")
    with seen_memories() as found:
        execute(make_config(policy), workdir)
    assert found == {"policy": {"device"}, "optim": {"device"}, "reference": {"device"}}
    return workdir


def test_a_run_with_moments_and_reference_in_host_memory_is_the_same_run(policy, straight, tmp_path):
    with seen_memories() as found:
        execute(make_config(policy, **HOST), tmp_path)
    assert found == {"policy": {"device"}, "optim": {KIND}, "reference": {KIND}}
    assert outcome(tmp_path) == outcome(straight)


@pytest.mark.parametrize(("before", "after"), [(HOST, HOST), (HOST, {}), ({}, HOST)], ids=["stays", "leaves", "comes"])
def test_a_run_cut_short_goes_on_under_either_setting(policy, straight, tmp_path, before, after):
    stop, calls, decode = hosts.Stop(), itertools.count(1), rollout.completion_text

    def counted(*given):
        # 12 completions of the base's evaluation, 16 of each rollout: in the third, when the reference has changed.
        stop.requested = stop.requested or next(calls) == 12 + 2 * 16 + 3
        return decode(*given)

    with mock.patch.object(rollout, "completion_text", counted), pytest.raises(Stopped):
        execute(make_config(policy, **before), tmp_path, stop)
    assert checkpoint.latest_step(tmp_path / "checkpoints" / STAGE) == 4
    with seen_memories() as found:
        execute(make_config(policy, **after), tmp_path)
    assert found["optim"] == found["reference"] == ({KIND} if after else {"device"})
    assert outcome(tmp_path) == outcome(straight)


def test_on_eight_devices_as_well(policy, tmp_path):
    eight = {"sampler__prefill_prompts": 8, "rl__microbatch_rows": 8, "rl__updates": 2, "eval__problems": 0}
    for name, more in (("device", {}), ("host", HOST)):
        config = make_config(policy, **eight, **more)
        config.mesh.update({"fsdp": 4, "tensor": 2})
        with quick_compilation(), seen_memories() as found, mock.patch.object(hosts, "on_sigterm", hosts.Stop):
            pipeline.execute(config, tmp_path / name)
    assert found == {"policy": {"device"}, "optim": {KIND}, "reference": {KIND}}
    assert len(metrics(tmp_path / "host")) == 2
    assert outcome(tmp_path / "host") == outcome(tmp_path / "device")


def test_fine_tuning_honours_the_key(policy, tmp_path):
    talks = [{"messages": [{"role": "user", "content": f"{i} + 2"}, {"role": "assistant", "content": f"{i + 2}"}]}
             for i in range(12)]  # fmt: skip
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    shape = {"sft__rows": 2, "sft__microbatch_rows": 1, "sft__row_tokens": 64, "sft__epochs": 4.0}
    config = make_config(policy, stages=("sft",), sft__data=str(tmp_path / "talks.jsonl"), eval__problems=0, **shape)
    ran = []
    for where in sharding.MEMORIES:
        config.optim.moments_on = where
        with seen_memories() as found:
            execute(config, tmp_path / where)
        assert found["optim"] == ({KIND} if where == "host" else {"device"})
        ran.append(
            ((tmp_path / where / "models" / "sft" / "model.safetensors").read_bytes(), metrics(tmp_path / where))
        )
    assert len(ran[0][1]) > 2 and ran[0] == ran[1]


@pytest.mark.parametrize(("change", "key"), [({"optim__moments_on": "host"}, "optim.moments_on"),
                                             ({"rl__reference_on": "host"}, "rl.reference_on")])  # fmt: skip
def test_devices_without_such_a_memory_name_the_key(policy, tmp_path, monkeypatch, change, key):
    monkeypatch.setitem(sharding.MEMORIES, "host", "attic")
    with pytest.raises(ValueError, match=f"config.{key} is 'host', which these devices do not have: .*attic"):
        execute(make_config(policy, **change), tmp_path)
    with pytest.raises(ValueError, match=f"{key} is 'attic', wanted one of device, host"):
        execute(make_config(policy, **dict.fromkeys(change, "attic")), tmp_path)
