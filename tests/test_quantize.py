"""Laws of quantized weights: how far values move, that products, decoding and meshes agree with the matrices that the
values stand for, and which matrices are quantized."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import DEEPSEEK, QWEN, QWEN_MOE, jit, one_device, random_params

from r1jax import run, sharding
from r1jax.draw import DrawConfig
from r1jax.model import quantize, transformer
from r1jax.model.config import ModelConfig, Paths
from r1jax.model.experts import experts_local, experts_some
from r1jax.model.quantize import KINDS, Quantized
from r1jax.sampler import sample
from r1jax.slots import SamplerConfig, Verbs
from r1jax.types import Params, Request

FAMILIES = {"mla, mixture": DEEPSEEK, "gqa, dense": QWEN, "gqa, mixture": QWEN_MOE}
PROMPTS = ((5, 6, 7, 8, 9), (3, 4))
LIMIT = 10


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def whole(tree: Params) -> Params:
    """With arrays for the quantized matrices."""
    is_quantized = lambda leaf: isinstance(leaf, Quantized)  # noqa: E731
    return jax.tree.map(lambda leaf: quantize.dequantize(leaf, jnp.float32), tree, is_leaf=is_quantized)


def laid_out(config: ModelConfig, params: Params, layout: sharding.Layout, kind: str, dtype: str = "float32") -> Params:
    """Weights as a rollout gets them."""
    return run.decode_layout(run.Policy(config, params, None, None), layout, dtype, kind)(params)


# --- values and products -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("summed", [(-2,), (-3, -2), (-1,)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_no_value_moves_by_more_than_half_a_step(kind: str, summed: tuple[int, ...]) -> None:
    w = (normal(0, 3, 4, 6, 5) * jnp.exp(3 * normal(1, 3, 4, 6, 5))).at[1].set(0)
    made = quantize.quantize(w, summed, kind)
    back, scale = np.asarray(quantize.dequantize(made, jnp.float32)), np.asarray(made.scale)
    assert made.values.dtype == KINDS[kind] and made.shape == w.shape
    assert scale.shape == tuple(1 if i - 4 in summed else n for i, n in enumerate(w.shape))
    step = scale
    if kind == "fp8":  # three bits behind the leading one, and nothing finer than 2**-9
        step = scale * np.maximum(np.exp2(np.floor(np.log2(np.abs(w / scale) + 1e-30)) - 3), 2.0**-9)
    assert (np.abs(back - w) <= step * (0.5 + 1e-4)).all()
    assert not back[1].any() and np.isfinite(back).all()
    # A channel's largest value stays what it is: no bit of the range is wasted.
    np.testing.assert_allclose(np.abs(back).max(summed), np.abs(w).max(summed), rtol=1e-6)


PRODUCTS = {  # as the layers have them: equation, shapes, axes that are summed
    "q": ("...d,dhe->...he", (2, 3, 8), (8, 2, 6), (-3,)),
    "q_a": ("...d,dr->...r", (3, 8), (8, 5), (-2,)),
    "k_b": ("bhn,chn->bhc", (3, 2, 6), (7, 2, 6), (-1,)),
    "v_b": ("bhc,chv->bhv", (3, 2, 7), (7, 2, 5), (-3,)),
    "o": ("bthv,hvd->btd", (2, 3, 2, 5), (2, 5, 8), (-3, -2)),
    "down": ("...d,df->...f", (2, 3, 8), (8, 9), (-2,)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_is_that_with_the_matrix_that_is_meant(name: str, kind: str) -> None:
    equation, left, right, summed = PRODUCTS[name]
    assert quantize.SUMMED[name] == summed
    x, w = normal(0, *left), quantize.quantize(normal(1, *right) * jnp.exp(normal(2, *right)), summed, kind)
    want = jnp.einsum(equation, x, quantize.dequantize(w, jnp.float32))
    np.testing.assert_allclose(quantize.product(equation, x, w), want, rtol=1e-5, atol=1e-5)
    others = [axes for axes in ((-1,), (-2,), (-3,)) if axes[0] not in summed and -axes[0] <= len(right)]
    for axes in others:  # what cannot wait until after the product is no silent mistake
        with pytest.raises(AssertionError):
            quantize.product(equation, x, quantize.quantize(normal(1, *right), axes, kind))


# Of a TPU v5p the grouped product takes int8 as it is; a CPU has one of the same meaning.
@pytest.mark.parametrize("device", ["cpu", "TPU v5"])
@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_those_with_the_matrices_that_are_meant(kind: str, device: str) -> None:
    x, ids = normal(0, 9, 8), jnp.asarray(np.random.default_rng(0).integers(0, 4, (9, 2)))
    gates, shapes = abs(normal(1, 9, 2)), [(4, 8, 6), (4, 8, 6), (4, 6, 8)]
    weights = [quantize.quantize(normal(i, *s), (-2,), kind) for i, s in enumerate(shapes)]
    held = [jax.tree.map(lambda a: a[2:], w) for w in weights]

    def run_experts(weights: list, held: list) -> list:
        # Two experts are held here, once with room for so few tokens that they come in turns.
        some = [experts_some(x, ids - 2, gates, tuple(held), room) for room in (64, 3)]
        return [experts_local(x, ids, gates, *weights), *some]

    want = jit(run_experts)(*map(whole, (weights, held)))
    with mock.patch.object(sharding, "device_kind", lambda: device):
        got = jit(run_experts)(weights, held)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


# --- decoding ------------------------------------------------------------------------------------------------------


def sampled(config: ModelConfig, weights: Params, layout: sharding.Layout, temperature: float, paths: Paths) -> dict:
    """Eight completions, by prompt and member."""
    slots = max(8, layout.size("slots"))
    sizes = SamplerConfig(slots=slots, tokens_per_dispatch=LIMIT, cache_bucket=32, prefill_prompts=slots)
    verbs = Verbs(config, sizes, DrawConfig(temperature), layout, [7], paths=paths)
    verbs.prefill, verbs.insert, verbs.generate = jit(verbs.prefill), jit(verbs.insert), jit(verbs.generate)
    requests = [Request(i, member, ids) for i, ids in enumerate(PROMPTS) for member in range(4)]
    return {
        (c.prompt, c.member): c for c in sample(verbs, weights, requests, jax.random.key(3), LIMIT, with_experts=True)
    }


@pytest.mark.parametrize(
    ("config", "kind", "attention"),
    [(DEEPSEEK, "int8", "whole"), (DEEPSEEK, "fp8", "blocks"), (QWEN, "int8", "whole")],
    ids=["mla, int8", "mla, fp8, in blocks", "gqa, int8"],
)
def test_greedy_tokens_are_those_of_the_full_forward_with_the_matrices_that_are_meant(
    config: ModelConfig, kind: str, attention: str
) -> None:
    layout = one_device()["decode"]
    weights = laid_out(config, random_params(config), layout, kind)
    found = sampled(config, weights, layout, 0.0, Paths(attention))
    forward = jit(lambda params, tokens: transformer.forward(params, config, tokens))
    for (prompt, _), c in found.items():
        tokens, start = [*PROMPTS[prompt], *c.tokens], len(PROMPTS[prompt]) - 1
        padded = np.zeros((1, 16), np.int32)
        padded[0, : len(tokens)] = tokens
        logp = jax.nn.log_softmax(forward(whole(weights), padded)[0, start : start + len(c.tokens)])
        np.testing.assert_array_equal(c.tokens, logp.argmax(-1))
        np.testing.assert_allclose(c.logp, logp.max(-1), rtol=1e-4, atol=1e-4)
    exact = sampled(config, random_params(config), layout, 0.0, Paths(attention))
    assert max(np.abs(found[i].logp[:1] - exact[i].logp[:1]).max() for i in found) > 1e-3, "the policy is another one"


ALONE = dict[tuple[str, str], tuple[Params, dict]]


@pytest.fixture(scope="module")
def alone() -> ALONE:
    layout = one_device()["decode"]
    out = {}
    for config, kind in ((DEEPSEEK, "int8"), (QWEN, "fp8")):
        weights = laid_out(config, random_params(config), layout, kind)
        out[config.attention, kind] = weights, sampled(config, weights, layout, 1.0, Paths())
    return out


@pytest.mark.parametrize(
    ("config", "kind", "sizes"),
    [
        (DEEPSEEK, "int8", {"fsdp": 2, "expert": 2, "tensor": 2}),
        (DEEPSEEK, "int8", {"data": 4, "context": 2}),
        (QWEN, "fp8", {"data": 2, "fsdp": 2, "tensor": 2}),
    ],
    ids=lambda value: value.attention if isinstance(value, ModelConfig) else str(value),
)
def test_eight_devices_quantize_and_sample_as_one(config: ModelConfig, kind: str, sizes: dict, alone: ALONE) -> None:
    want_weights, want = alone[config.attention, kind]
    layouts = sharding.layouts(sharding.make_mesh(sizes))
    params = sharding.reshard(random_params(config), run.param_shardings(config, layouts["train"]))
    weights = laid_out(config, params, layouts["decode"], kind)
    jax.tree.map(np.testing.assert_array_equal, weights, want_weights)
    axes = transformer.logical_axes(config)
    for stack in ("dense", "moe"):
        for name, w in weights[stack]["attn"].items() if stack in weights else ():
            if not isinstance(w, Quantized):
                continue
            # A device holds the scales of the channels whose values it holds, and no others.
            lies = layouts["decode"].sharding(*axes[stack]["attn"][name])
            assert w.values.sharding.is_equivalent_to(lies, w.values.ndim)
            held, scales = (a.addressable_shards[0].data.shape for a in (w.values, w.scale))
            assert scales == tuple(1 if n == 1 else h for h, n in zip(held, w.scale.shape, strict=True))
    got = sampled(config, weights, layouts["decode"], 1.0, Paths(expert_exchange="all_to_all", expert_slack=0.5))
    assert got.keys() == want.keys() and len({c.tokens.tobytes() for c in want.values()}) > 4
    for key, completion in got.items():
        np.testing.assert_array_equal(completion.tokens, want[key].tokens)
        np.testing.assert_allclose(completion.logp, want[key].logp, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(completion.experts, want[key].experts)


# --- which matrices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_only_large_matrices_are_quantized(config: ModelConfig, kind: str) -> None:
    params, layout = random_params(config), one_device()["decode"]
    quantized, exact = (laid_out(config, params, layout, one, "bfloat16") for one in (kind, ""))
    shapes = transformer.shapes(config)
    is_quantized = lambda leaf: isinstance(leaf, Quantized)  # noqa: E731
    left = 0
    for (path, leaf), like, old in zip(
        jax.tree_util.tree_leaves_with_path(quantized, is_leaf=is_quantized),
        jax.tree.leaves(shapes),
        jax.tree.leaves(exact),
        strict=True,
    ):
        if is_quantized(leaf):
            assert leaf.values.dtype == KINDS[kind] and leaf.scale.dtype == jnp.float32 and leaf.shape == like.shape
            continue
        np.testing.assert_array_equal(leaf, old)
        assert leaf.dtype == old.dtype
        left += leaf.size
        name = jax.tree_util.keystr(path[-1:], simple=True)
        assert name.endswith(("norm", "bias", "router")) or name in ("embed", "head"), name
    assert 0 < left < sum(a.size for a in jax.tree.leaves(shapes)) / 2
