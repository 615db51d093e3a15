"""Whose policy a stage begins with: base, a stage of this run or of an earlier one, any folder; and what is refused."""

import contextlib
import dataclasses
import pathlib

import numpy as np
import pytest
import test_r1
import tiny_run
from ml_collections import ConfigDict
from tiny import one_device
from tiny_run import POLICY, STAGE, execute, make_config, make_policy

from configs import models
from r1jax import hand_over, held_out, optim, pipeline, run
from r1jax.checkpoint import Checkpoints
from r1jax.model import convert
from r1jax.stages import reward_models


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "policy"
    make_policy(folder)
    return folder


@pytest.fixture(scope="module")
def another(tmp_path_factory):
    """A model of another architecture."""
    folder = tmp_path_factory.mktemp("another") / "policy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_run, "POLICY", dataclasses.replace(POLICY, hidden_size=16))
        make_policy(folder)
    return folder


@pytest.fixture
def unmeasured(monkeypatch):
    """The stage evaluate does nothing but hand on what it was given."""
    monkeypatch.setattr(held_out, "evaluate_policy", lambda *_: None)


def embedding(path: pathlib.Path) -> np.ndarray:
    return convert.load(path)[1]["embed"]


def is_of(policy: run.Policy, folder: pathlib.Path) -> bool:
    return np.array_equal(policy.params["embed"], embedding(folder))


def test_what_follows_pretraining_starts_from_its_weights_also_when_it_was_cut_short(
    policy, tmp_path, monkeypatch, unmeasured
):
    monkeypatch.setitem(models.MODELS, "miniature", dataclasses.asdict(POLICY))
    config = make_config(policy, stages=("pretrain", "evaluate"), model__name="miniature")
    make_policy(tmp_path / "models" / "pretrain")
    assert is_of(execute(config, tmp_path), tmp_path / "models" / "pretrain")


def test_a_stage_starts_from_any_released_model_folder(policy, another, tmp_path, unmeasured):
    config = make_config(policy, stages=("evaluate",), pipeline={"evaluate": {"start": str(another)}})
    assert is_of(execute(config, tmp_path), another), "on purpose, so of another architecture, too"


def test_reward_models_hand_on_what_they_were_given_in_one_go_or_in_two(policy, tmp_path, monkeypatch, unmeasured):
    def stage(run_: run.Run, config: ConfigDict, given: run.Policy) -> run.Policy:
        (tmp_path / "models" / run_.stage / "helpful").mkdir(parents=True)
        return given

    monkeypatch.setattr(reward_models, "stage", stage)
    config = make_config(policy, stages=("sft", "reward_models", "evaluate"))
    make_policy(tmp_path / "models" / "sft")
    assert [hand_over.start_of(config, i, tmp_path) for i in range(3)] == ["base", "sft", "sft"]
    first = execute(config, tmp_path)
    monkeypatch.setattr(reward_models, "stage", None)  # it is done
    for left in (first, execute(config, tmp_path)):
        assert is_of(left, tmp_path / "models" / "sft")


@pytest.mark.parametrize("kind", ["architecture", "tokenizer"])
def test_a_model_that_the_base_cannot_have_become_is_refused(policy, another, tmp_path, kind):
    left = tmp_path / "models" / "sft"
    make_policy(left)
    if kind == "tokenizer":
        (left / "tokenizer.model").write_bytes(
            (pipeline.PACKAGED["packaged:bilingual"] / "tokenizer.model").read_bytes()
        )
        given, found = policy, "their tokenizers"
    else:
        given, found = another, "hidden_size 32 and 16"
    for stages in (("sft", "evaluate"), ("sft",)):
        with pytest.raises(
            ValueError, match=f"{left} is of another model than {given}, .* differ in {found}. Set config"
        ):
            execute(make_config(given, stages=stages), tmp_path)
    alone = make_config(given, stages=("evaluate",), pipeline={"evaluate": {"start": "sft"}})
    with pytest.raises(ValueError, match=f"differ in {found}"):
        execute(alone, tmp_path)


def test_a_checkpoint_of_another_architecture_is_refused(policy, another, tmp_path):
    layouts, folder = one_device(), tmp_path / "checkpoints" / STAGE
    config = make_config(another, grpo__kl_coef=0.0)
    other = pipeline.load_policy(config, layouts)
    state = run.first_state(
        other, layouts["train"], optim.make_optimizer(run.optim_config(config), other.params), "device"
    )
    with contextlib.closing(Checkpoints(folder, save_every=1, keep=1)) as saved:
        saved.save(2, state, {})
    with pytest.raises(ValueError, match=rf"{folder}/2 does not fit .*\[.*16.*wanted .*\[.*32.*Set config.model and"):
        execute(make_config(policy, grpo__kl_coef=0.0, eval__problems=0), tmp_path)


def test_a_stage_run_alone_starts_from_what_lies_there_or_from_a_folder(policy, tmp_path):
    config = test_r1.make_config(policy)
    (tmp_path / "models" / "dev3").mkdir(parents=True)
    (tmp_path / "models" / "dev3" / "config.json").touch()

    def start(name: str, **own: str) -> str:
        config.stages = (name,)
        with config.unlocked():
            config.pipeline[name].update(own)
        return hand_over.start_of(config, 0, tmp_path)

    assert [start(name) for name in ("zero", "r1", "reward_models")] == ["base", "dev3", "dev3"]
    assert start("r1", start=str(policy)) == str(policy) and start("r1", start="reward_models") == "dev3"
    with pytest.raises(
        ValueError, match=r"dev2.start is 'dev1', wanted base, .* in .*models \(dev3\), or a released-mod"
    ):
        start("dev2")
    with pytest.raises(ValueError, match=r"config.pipeline.dev2.start is missing, and config.stages begins with dev2"):
        start("dev2", start="")
    # Who samples is found by the same rule.
    for name in ("dev3", "reward_models", str(policy)):
        found = hand_over.resolve(config, "config.curate.sampler", name, (), tmp_path)
        assert found == ("dev3" if name == "reward_models" else name)
    with pytest.raises(ValueError, match="config.curate.sampler is 'nowhere', wanted base"):
        hand_over.resolve(config, "config.curate.sampler", "nowhere", (), tmp_path)
