"""Laws of the mesh: every layout computes what one device computes, and an impossible one names the key to change."""

import dataclasses
import itertools
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import DEEPSEEK, QWEN, QWEN_MOE, jit, made_sample, random_completion, random_params

from r1jax import grpo, hosts, minibatches, run, sharding, updates
from r1jax.draw import DrawConfig
from r1jax.model.config import ModelConfig, Paths
from r1jax.sampler import sample
from r1jax.slots import SamplerConfig, Verbs
from r1jax.types import Params, Request

COMPOSED = {"rtol": 1e-4, "atol": 1e-4}
PROMPTS = ((5, 6, 7, 8, 9), (3, 4))
LIMIT = 10
DESCENT = optax.sgd(1.0)  # the parameters move by the gradient itself

# Partitioned programs take seconds to compile: one dense layer and one mixture are enough of each.
MLA = dataclasses.replace(DEEPSEEK, num_hidden_layers=2)
EACH_AXIS = [{axis: 2} for axis in sharding.AXES]
PAIRS = [{a: 4, b: 2} for a, b in itertools.combinations(sharding.AXES, 2)]
THREE = [{"expert": 2, "context": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}]
ALL_FIVE = dict.fromkeys(sharding.AXES, 2)  # takes 32 devices
UPDATES = [(MLA, sizes) for sizes in [*EACH_AXIS[1:], THREE[0]]] + [(QWEN, sizes) for sizes in [{"data": 2}, THREE[1]]]
# Decoding knows neither context nor fsdp as axes of its own: rows lie over them as over data.
SAMPLINGS = [(MLA, sizes) for sizes in [{"expert": 2}, {"fsdp": 2, "context": 2, "tensor": 2}]] + [(QWEN, THREE[1])]
# Training and decoding under meshes of their own: no axis is as long in the one as in the other.
APART = [(config, {"fsdp": 4, "expert": 2}, {"data": 4, "tensor": 2}) for config in (MLA, QWEN)]
APART += [(MLA, {"fsdp": 4, "expert": 2}, {"expert": 8})]


def and_slowly_the_rest(quick: list[tuple]) -> list:
    """All layouts for both policies, those that are not among the quick cases marked slow."""
    every = [(config, sizes) for config in (MLA, QWEN) for sizes in [*EACH_AXIS, *PAIRS, *THREE, ALL_FIVE]]
    return quick + [pytest.param(*case, marks=pytest.mark.slow) for case in every if case not in quick]


def paths_of(mesh: jax.sharding.Mesh) -> Paths:
    """Of experts, single axes take one way, and mixtures the other with so little room that tokens go in turns."""
    mixed = sum(n > 1 for n in mesh.shape.values()) > 1
    return Paths(expert_exchange="all_to_all", expert_slack=0.5) if mixed else Paths()


def name(value: ModelConfig | dict) -> str:
    return value.attention if isinstance(value, ModelConfig) else " ".join(f"{a}={n}" for a, n in value.items())


def mesh_of(sizes: dict[str, int]) -> jax.sharding.Mesh:
    """Two devices for one axis, eight for two or three, more where there are more."""
    n = int(np.prod(list(sizes.values())))
    if n > jax.device_count():
        pytest.skip(f"takes {n} devices: R1JAX_TEST_DEVICES={n}, as test_all_five_axes_at_once does")
    return sharding.make_mesh(sizes, jax.devices()[:n])


def minibatch(config: ModelConfig) -> tuple[dict[str, np.ndarray], int]:
    rng = np.random.default_rng(0)
    lengths = np.random.default_rng(1).integers(1, LIMIT + 1, (len(PROMPTS), 16))
    completions = [
        random_completion(config, rng, i, member, len(PROMPTS[i]), int(n)) for (i, member), n in np.ndenumerate(lengths)
    ]
    items = [minibatches.Trained(made_sample(PROMPTS[c.prompt], c), float(rng.normal()), True) for c in completions]
    shape = minibatches.Shape(row_tokens=24, rows=8, share_prompt=True, replay=config.n_moe > 0)
    return minibatches.pack(items, shape, grpo.GrpoConfig(), LIMIT)


def policy_on(config: ModelConfig, params: Params, layout: sharding.Layout) -> run.Policy:
    return run.Policy(config, sharding.reshard(params, run.param_shardings(config, layout)), None, None)


def updated(policy: run.Policy, layout: sharding.Layout) -> tuple[Params, dict[str, Any]]:
    """Weights after one RL update, and its record."""
    config = policy.config
    program = updates.Program(config, layout, router_bias_rate=0.01, paths=paths_of(layout.mesh))
    update = jit(updates.make_rl_update(program, grpo.GrpoConfig(kl_coef=0), DESCENT, 25))
    state = run.first_state(policy, layout, DESCENT, "device")
    arrays, n = minibatch(config)
    assert n == 2
    state, record = update(state, run.put_rows(arrays, layout), n)
    for new, old in zip(jax.tree.leaves(state["policy"]), jax.tree.leaves(policy.params), strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, new.ndim)
    return state["policy"], jax.tree.map(hosts.fetch, record)


def learned(config: ModelConfig, params: Params, layout: sharding.Layout) -> dict[str, Any]:
    """Record and gradient of one RL update."""
    new, record = updated(policy_on(config, params, layout), layout)
    return {"record": record, "gradient": jax.tree.map(lambda old, new: old - hosts.fetch(new), params, new)}


def sampler(config: ModelConfig, layout: sharding.Layout) -> Callable[[Params], dict[tuple[int, int], Any]]:
    """Makes of weights laid out for decoding the tokens and log-probabilities of eight completions."""
    slots = max(8, layout.size("slots"))
    sizes = SamplerConfig(slots=slots, tokens_per_dispatch=LIMIT, cache_bucket=32, prefill_prompts=slots)
    verbs = Verbs(config, sizes, DrawConfig(), layout, [7], paths=paths_of(layout.mesh))
    verbs.prefill, verbs.insert, verbs.generate = jit(verbs.prefill), jit(verbs.insert), jit(verbs.generate)
    requests = [Request(i, member, ids) for i, ids in enumerate(PROMPTS) for member in range(4)]

    def sampled(weights: Params) -> dict[tuple[int, int], Any]:
        done = sample(verbs, weights, requests, jax.random.key(3), LIMIT, with_experts=True)
        return {(c.prompt, c.member): c for c in done}

    return sampled


def assert_same(got: dict[tuple[int, int], Any], want: dict[tuple[int, int], Any]) -> None:
    assert got.keys() == want.keys() and len({c.tokens.tobytes() for c in want.values()}) > 4
    for key, completion in got.items():
        np.testing.assert_array_equal(completion.tokens, want[key].tokens)
        np.testing.assert_allclose(completion.logp, want[key].logp, **COMPOSED)
        np.testing.assert_array_equal(completion.experts, want[key].experts)


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[Params, dict, tuple[dict, dict]]]:
    """Weights and what one device makes of them, per attention: an update, samples before it and after it."""
    layouts = sharding.layouts(sharding.make_mesh({}, jax.devices()[:1]))
    out = {}
    for config in (MLA, QWEN):
        params, draw = random_params(config), sampler(config, layouts["decode"])
        update = learned(config, params, layouts["train"])
        moved = jax.tree.map(np.subtract, params, update["gradient"])
        lies = run.param_shardings(config, layouts["decode"])
        out[config.attention] = params, update, tuple(draw(sharding.reshard(w, lies)) for w in (params, moved))
    return out


@pytest.mark.parametrize(("config", "sizes"), and_slowly_the_rest(UPDATES), ids=name)
def test_an_update_is_one_devices(config: ModelConfig, sizes: dict, alone: dict) -> None:
    params, want, _ = alone[config.attention]
    got = learned(config, params, sharding.layouts(mesh_of(sizes))["train"])
    assert max(np.abs(g).max() for g in jax.tree.leaves(want["gradient"])) > 1e-2
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, **COMPOSED), got, want)


@pytest.mark.parametrize(("config", "sizes"), and_slowly_the_rest(SAMPLINGS), ids=name)
def test_sampled_tokens_are_one_devices(config: ModelConfig, sizes: dict, alone: dict) -> None:
    params, _, (want, _) = alone[config.attention]
    layout = sharding.layouts(mesh_of(sizes))["decode"]
    weights = sharding.reshard(params, run.param_shardings(config, layout))
    assert_same(sampler(config, layout)(weights), want)


@pytest.mark.parametrize(("config", "train", "decode"), APART, ids=name)
def test_a_policy_trained_under_one_mesh_is_sampled_under_another(
    config: ModelConfig, train: dict, decode: dict, alone: dict
) -> None:
    params, _, (before, after) = alone[config.attention]
    layouts = sharding.layouts(mesh_of(train), decode)
    policy = policy_on(config, params, layouts["train"])
    to_decode, draw = run.decode_layout(policy, layouts["decode"], "float32"), sampler(config, layouts["decode"])
    lies = run.param_shardings(config, layouts["decode"])

    def laid_out(params: Params) -> Params:
        weights = to_decode(params)
        jax.tree.map(np.testing.assert_array_equal, weights, params)
        assert all(jax.tree.leaves(jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), weights, lies)))
        return weights

    assert_same(draw(laid_out(policy.params)), before)
    new, _ = updated(policy, layouts["train"])
    assert_same(draw(laid_out(new)), after)
    assert any(not np.array_equal(after[key].tokens, before[key].tokens) for key in before)


@pytest.mark.slow
def test_all_five_axes_at_once() -> None:
    laws = (test_an_update_is_one_devices, test_sampled_tokens_are_one_devices)
    cases = [f"{__file__}::{law.__name__}[{name(c)}-{name(ALL_FIVE)}]" for law in laws for c in (MLA, QWEN)]
    command = [sys.executable, "-m", "pytest", "-q", "--slow", "-p", "no:cacheprovider", *cases]
    env, root = os.environ | {"R1JAX_TEST_DEVICES": "32"}, pathlib.Path(__file__).parent.parent
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, check=False)
    assert re.search(r"^4 passed", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.parametrize("config", [MLA, QWEN], ids=name)
def test_slots_on_different_devices_decode_without_each_other(config: ModelConfig) -> None:
    layout = sharding.layouts(mesh_of({"data": 2}))["decode"]
    verbs = Verbs(config, SamplerConfig(slots=8, tokens_per_dispatch=4), DrawConfig(), layout, [7])
    weights = sharding.reshard(random_params(config), run.param_shardings(config, layout))
    slots = verbs.empty(8, 32)
    leaves, tree = jax.tree.flatten((weights, slots))

    def generate(leaves: list) -> list:  # plain arrays: what `lower` makes of a dataclass is none of its kind
        weights, slots = jax.tree.unflatten(tree, leaves)
        return jax.tree.leaves(verbs.generate(weights, slots, slots.is_free, jnp.int32(4), jnp.int32(0)))

    program = jit(generate).lower(leaves).compile().as_text()
    moves = re.findall(r" = (\S+) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\(", program)
    assert [(shape.split("[")[0], kind) for shape, kind in moves] == [("s32", "all-reduce")]  # how many are still live


def test_resharding_keeps_every_bit_and_gathers_what_decoding_reads() -> None:
    params = random_params(DEEPSEEK)
    layouts = sharding.layouts(sharding.make_mesh({"fsdp": 2, "expert": 2, "tensor": -1}))
    train, decode = (run.param_shardings(DEEPSEEK, layouts[phase]) for phase in ("train", "decode"))
    there = sharding.reshard(params, train)
    here = sharding.reshard(there, decode)
    jax.tree.map(np.testing.assert_array_equal, sharding.reshard(here, train), params)

    def held(of: Params, part: str, name: str) -> tuple[int, ...]:
        return of["moe"][part][name].addressable_shards[0].data.shape

    # [L, E, D, F] and [L, D, c]: decoding reads every width of what a device holds; experts lie over tensor as well.
    assert held(there, "mlp", "gate") == (2, 2, 8, 4) and held(here, "mlp", "gate") == (2, 2, 16, 4)
    assert held(there, "attn", "kv_a")[1] == 4 and held(here, "attn", "kv_a")[1] == 16


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"data": 3}, r"config.mesh .*'data': 3.* does not multiply to the 8 devices"),
        ({"data": 3, "tensor": -1}, r"does not multiply to the 8 devices .* change config.mesh"),
        ({"data": -1, "tensor": -1}, "config.mesh sizes must be positive with at most one -1"),
        ({"data": 0}, "config.mesh sizes must be positive"),
        ({"model": 8}, r"config.mesh has unknown axes \['model'\]; the axes are data, fsdp, expert, context, tensor"),
    ],
)
def test_an_impossible_mesh_names_the_key(sizes: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sharding.make_mesh(sizes)


def test_rows_that_do_not_divide_name_the_key() -> None:
    for sizes, said in (
        ({"context": 2}, r"config.mesh.context \(2\)"),
        ({"context": 2, "tensor": 4}, r"context x .*\(8\)"),
    ):
        layout = sharding.layouts(mesh_of(sizes))["train"]
        with pytest.raises(ValueError, match=f"rows of 25 tokens do not divide over .*{said}; change it"):
            run.put_rows({"tokens": np.zeros((1, 4, 25), np.int32)}, layout)


@pytest.mark.parametrize(
    ("config", "sizes", "said"),
    [
        (DEEPSEEK, {"tensor": 8}, r"dense\.attn\.\w+: heads of 2 does not divide over 8 .* change config.mesh.tensor"),
        (QWEN_MOE, {"expert": 8}, r"moe\.mlp\.\w+: experts of 4 does not divide over 8 .* change config.mesh.expert"),
        (
            dataclasses.replace(QWEN, hidden_size=20),
            {"fsdp": -1},
            r"\w+: width of 20 does not divide over 8 devices; change config.mesh.fsdp",
        ),
    ],
    ids=["heads", "experts", "width"],
)
def test_a_weight_that_does_not_divide_is_named_with_the_key(config: ModelConfig, sizes: dict, said: str) -> None:
    layout = sharding.layouts(sharding.make_mesh(sizes))["train"]
    with pytest.raises(ValueError, match=said):
        run.param_shardings(config, layout)
