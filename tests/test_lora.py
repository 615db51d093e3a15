"""Adapters add scale * B A to the released matrices, nothing else is trained, and PEFT's names fit."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from folders import CONFIGS, DEEPSEEK, random_tree
from safetensors.numpy import load_file
from tiny import QWEN, jit, one_device

from r1jax import run, sharding, updates
from r1jax.model import lora, tensors, transformer
from r1jax.model.config import ModelConfig
from r1jax.model.lora import Lora

ATTENTION = {"mla": ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"), "gqa": ("q_proj", "k_proj", "o_proj")}
LOW_RANK = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
DENSE = ("gate_proj", "up_proj", "down_proj")


def all_targets(config: ModelConfig, rank: int = 3) -> Lora:
    targets = LOW_RANK if config.q_lora_rank else ATTENTION[config.attention]
    return Lora(rank, 6.0, targets + DENSE)


def random_adapters(config: ModelConfig, asked: Lora) -> dict:
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), s.dtype), lora.shapes(config, asked))


def stored(tree: dict, config: ModelConfig) -> dict[str, np.ndarray]:
    """The released tensors of a tree, as an export would write them."""
    flat, size, out = flatten_dict(tree, sep="."), tensors.sizes(config), {}
    for entry in tensors.entries(config):
        for number, name in enumerate(entry.names if not entry.copy else ()):
            place = np.unravel_index(number, entry.lead) if entry.lead else ()
            parts = {leaf: np.asarray(flat[at])[place] for leaf, at, _ in tensors.leaves(entry, size)}
            out[name] = tensors.to_stored(parts, entry.row, size)
    return out


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v3, low-rank query", "qwen2", "qwen3_moe", "llama"])
def test_merging_adds_to_the_released_matrices(name: str, tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(CONFIGS[name], num_nextn_predict_layers=0)
    targets = all_targets(config).targets[: -3 if name == "qwen3_moe" else None]  # it has no dense matrices
    asked = Lora(3, 6.0, targets)
    frozen, adapters = random_tree(config), random_adapters(config, asked)
    lora.save_peft(adapters, config, asked, tmp_path)
    before, after = stored(frozen, config), stored(lora.merge(frozen, adapters, config, asked), config)
    peft, n = load_file(tmp_path / "adapter_model.safetensors"), 0
    for tensor, want in before.items():
        module = f"base_model.model.{tensor.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in peft:
            a, b = (peft.pop(f"{module}.lora_{which}.weight") for which in "AB")
            want, n = want + 6.0 / 3 * b @ a, n + 1
        np.testing.assert_allclose(after[tensor], want, atol=1e-5, rtol=1e-5, err_msg=tensor)
    assert not peft and n >= len(targets) * config.num_hidden_layers - 3 * config.n_moe
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (described["peft_type"], described["r"], described["lora_alpha"]) == ("LORA", 3, 6.0)
    for tensor in before:
        module = tensor.removesuffix(".weight")
        is_target = any(module.endswith(f".{target}") for target in described["target_modules"])
        assert is_target == any(t.endswith(module.split(".", 3)[-1]) for t in described["target_modules"]), module
        assert not (is_target and ".experts." in module)


def test_fresh_adapters_change_nothing() -> None:
    asked = all_targets(DEEPSEEK)
    frozen, fresh = random_tree(DEEPSEEK), lora.init(DEEPSEEK, asked, jax.random.key(0))
    merged = lora.merge(frozen, fresh, DEEPSEEK, asked)
    jax.tree.map(np.testing.assert_array_equal, merged, jax.tree.map(jnp.asarray, frozen))
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), fresh)
    assert like == lora.shapes(DEEPSEEK, asked)
    for pair in fresh[lora.KEY].values():
        bound = pair["a"].shape[-1] ** -0.5
        assert 0.8 * bound < np.abs(pair["a"]).max() <= bound and np.unique(pair["a"]).size > 1


@pytest.mark.parametrize("mesh", [None, {"fsdp": 4, "tensor": 2}], ids=str)
def test_only_adapters_are_trained(mesh: dict | None) -> None:
    asked = Lora(2, 4.0, ("q_proj", "down_proj"))
    layout = (one_device() if mesh is None else sharding.layouts(sharding.make_mesh(mesh)))["train"]
    rng = np.random.default_rng(0)
    frozen = jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), transformer.shapes(QWEN))
    frozen = sharding.reshard(frozen, run.param_shardings(QWEN, layout))
    fresh = lora.init(QWEN, asked, jax.random.key(0))
    policy = run.Policy(QWEN, fresh, None, None, asked, frozen)
    optimizer = optax.sgd(1.0)
    state, like = (
        run.first_state(policy, layout, optimizer, "device"),
        run.state_like(policy, layout, optimizer, "device"),
    )
    adam = run.first_state(policy, layout, optax.adam(1e-3), "device")
    n_adapters = sum(a.size for a in jax.tree.leaves(fresh))
    assert sum(a.size for a in jax.tree.leaves(adam["optim"])) == 2 * n_adapters + 3, (
        "moments, counts of steps and skips"
    )
    assert n_adapters < sum(a.size for a in jax.tree.leaves(frozen)) / 3 and like.keys() == {"policy", "optim"}

    tokens = rng.integers(0, QWEN.vocab_size, (1, 8, 12)).astype(np.int32)
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, 2),
        "positions": np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape),
        "segments": np.ones_like(tokens),
        "parents": np.ones_like(tokens),
        "is_completion": np.arange(12) < np.full(tokens.shape, 11),
    }
    program = updates.Program(QWEN, layout, lora=asked)
    update = jit(updates.make_sft_update(program, optimizer))
    placed = run.put_rows(batch, layout)
    stepped, sums = update(state, placed, 1, frozen)
    again, _ = update(jax.tree.map(jnp.copy, stepped), placed, 1, frozen)

    def logps(adapters: dict) -> jax.Array:
        weights = lora.merge(frozen, adapters, QWEN, asked)
        x = transformer.hidden(weights, QWEN, jnp.asarray(tokens[0])).x
        return transformer.token_logps(weights, x, jnp.asarray(batch["targets"][0]))[0]

    def loss(adapters: dict) -> jax.Array:
        return -jnp.where(batch["is_completion"][0], logps(adapters), 0).sum() / batch["is_completion"].sum()

    grads = jax.grad(loss)(fresh)
    np.testing.assert_allclose(sums["loss"], loss(fresh), rtol=1e-5)
    for name, pair in fresh[lora.KEY].items():
        new, newer = stepped["policy"][lora.KEY][name], again["policy"][lora.KEY][name]
        np.testing.assert_array_equal(new["a"], pair["a"], err_msg="while B is zero, A has no gradient")
        np.testing.assert_allclose(new["b"], -grads[lora.KEY][name]["b"], atol=1e-6, rtol=1e-4, err_msg=name)
        assert np.abs(new["b"]).max() > 3e-4 and np.abs(newer["a"] - new["a"]).max() > 1e-8
    # Scoring sees the merged weights.
    score, strong = jit(updates.make_score(program)), random_adapters(QWEN, asked)
    got = [np.asarray(score(adapters, placed, 1, frozen)[0]) for adapters in (fresh, strong)]
    np.testing.assert_allclose(got, [logps(fresh), logps(strong)], atol=1e-5)
    assert np.abs(got[0] - got[1]).max() > 1e-3


def test_no_full_gradient_is_stacked() -> None:
    wide = {"hidden_size": 128, "num_hidden_layers": 12, "intermediate_size": 384, "head_dim": 32, "vocab_size": 32}
    config = dataclasses.replace(CONFIGS["llama"], **wide)
    asked = all_targets(config)
    frozen, fresh = transformer.shapes(config), lora.shapes(config, asked)
    optimizer, rows = optax.sgd(1.0), jax.ShapeDtypeStruct((1, 1, 8), np.int32)
    state = jax.eval_shape(lambda params: updates.init_state(params, optimizer), fresh)
    batch = dict.fromkeys(("tokens", "targets", "positions", "segments", "parents"), rows)
    batch["is_completion"] = jax.ShapeDtypeStruct(rows.shape, bool)
    program = updates.Program(config, one_device()["train"], remat="full", lora=asked)
    lowered = updates.make_sft_update(program, optimizer).lower(
        state, batch, jax.ShapeDtypeStruct((), np.int32), frozen
    )
    stack = sum(leaf.size * 4 for leaf in jax.tree.leaves(frozen["dense"]))
    assert lowered.compile().memory_analysis().temp_size_in_bytes < stack / 3


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"targets": ("q_proj", "w1")}, r"config\.lora\.targets has 'w1'; this model has .*down_proj.*q_proj"),
        ({"targets": ()}, r"config\.lora\.targets is empty"),
        ({"rank": -1}, r"config\.lora has rank -1"),
        ({"alpha": 0.0}, r"alpha 0\.0; wanted both above zero"),
    ],
)
def test_adapters_that_cannot_be_are_refused(fields: dict, says: str) -> None:
    good = {"rank": 2, "alpha": 4.0, "targets": ("q_proj",)}
    assert run.adapting(QWEN, good) == Lora(2, 4.0, ("q_proj",)) and run.adapting(QWEN, good | {"rank": 0}) is None
    with pytest.raises(ValueError, match=says):
        run.adapting(QWEN, good | fields)
