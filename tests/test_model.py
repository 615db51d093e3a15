"""Laws of the model: decoding, scanning, chunking, dispatch and remat change how it is computed, never what."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import DEEPSEEK, QWEN, QWEN_MOE, jit, random_params

from r1jax.model import layers, mla, transformer, vocabulary
from r1jax.model.config import ModelConfig, Paths, Rope
from r1jax.model.experts import experts_local, experts_some
from r1jax.model.moe import expert_load, moe, route

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
COMPOSED = {"rtol": 1e-4, "atol": 1e-4}
FAMILIES = {"mla, mixture": DEEPSEEK, "gqa, dense": QWEN, "gqa, mixture": QWEN_MOE}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- decoding and scanning -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_prefill_and_decode_are_the_full_forward(config: ModelConfig) -> None:
    params = random_params(config)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (3, 12))
    prompts, steps = np.array([5, 3, 1]), 7  # each slot is at a place of its own
    axis = transformer.ATTENTION[config.attention].LENGTH_AXIS

    @jit
    def both(params, tokens):
        full = transformer.hidden(params, config, tokens, keep=("experts",))
        segments = (jnp.arange(5) < prompts[:, None]).astype(jnp.int32)
        read = transformer.hidden(params, config, tokens[:, :5], segments=segments, keep=("cache",)).cache
        empty = transformer.empty_cache(config, 3, 16)
        where = (slice(None),) * axis + (slice(0, 5),)
        cache = jax.tree.map(lambda old, new: old.at[where].set(new), empty, read)

        apart = transformer.layers_apart(params)

        def step(cache, j):
            at = prompts + j
            x, cache, experts = transformer.decode_step(apart, config, tokens[jnp.arange(3), at], cache, at)
            return cache, (transformer.logits(params, x), experts)

        return transformer.logits(params, full.x), full.experts, jax.lax.scan(step, cache, jnp.arange(steps))[1]

    want, want_experts, (got, experts) = both(params, tokens)
    at = prompts[:, None] + np.arange(steps)
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got.swapaxes(0, 1), want[np.arange(3)[:, None], at], **COMPOSED)
    if config.n_moe:
        chosen = np.transpose(want_experts, (1, 2, 0, 3))[np.arange(3)[:, None], at]
        np.testing.assert_array_equal(np.transpose(experts, (2, 0, 1, 3)), chosen)


@pytest.mark.parametrize("q_lora_rank", [None, 7])
def test_absorbed_attention_is_expanded_attention(q_lora_rank: int | None) -> None:
    config = dataclasses.replace(DEEPSEEK, q_lora_rank=q_lora_rank)
    p = jax.tree.map(lambda a: a[1], random_params(config)["moe"]["attn"])
    x, positions = normal(0, 2, 9, 16), jnp.broadcast_to(jnp.arange(9), (2, 9))

    @jit
    def both(p, x):
        ones = jnp.ones((2, 9), jnp.int32)
        expanded, kept = mla.attention(p, config, x, positions, layers.attention_mask(ones, ones))
        cache = {"latent": jnp.full((2, 12, config.cache_width), 9.0).at[:, :8].set(kept["latent"][:, :8])}
        absorbed, cache = mla.decode(p, config, x[:, 8], cache, jnp.full(2, 8), jnp.full(2, 9))
        return expanded[:, 8], absorbed, kept["latent"][:, 8], cache["latent"][:, 8]

    expanded, absorbed, want_kept, kept = both(p, x)
    np.testing.assert_allclose(absorbed, expanded, **CLOSE)
    np.testing.assert_allclose(kept, want_kept, **CLOSE)


def test_scan_is_a_loop_over_layers() -> None:
    config, params = DEEPSEEK, random_params(DEEPSEEK)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 8))

    @jit
    def loop(params, tokens):
        positions, ones = jnp.broadcast_to(jnp.arange(8), (2, 8)), jnp.ones((2, 8), jnp.int32)
        mask, eps = layers.attention_mask(ones, ones), config.rms_norm_eps
        x = params["embed"][tokens]
        for stack, i in [("dense", 0), ("moe", 0), ("moe", 1)]:
            p = jax.tree.map(lambda a, i=i: a[i], params[stack])
            x = x + mla.attention(p["attn"], config, layers.rms_norm(x, p["attn_norm"], eps), positions, mask)[0]
            h = layers.rms_norm(x, p["mlp_norm"], eps)
            x = x + (moe(p["mlp"], config, h)[0] if stack == "moe" else layers.mlp(p["mlp"], h))
        return layers.rms_norm(x, params["norm"], eps) @ params["head"]

    @jit
    def scanned(params, tokens):
        return [
            transformer.logits(params, transformer.hidden(params, config, tokens, unroll=unroll).x) for unroll in (1, 2)
        ]

    want = loop(params, tokens)
    for got in scanned(params, tokens):
        np.testing.assert_allclose(got, want, **COMPOSED)


def test_remat_changes_no_gradient() -> None:
    config, params = QWEN_MOE, random_params(QWEN_MOE)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, config.vocab_size, (2, 8)))

    def gradient(remat, attention):
        def loss(params):
            x = transformer.hidden(params, config, tokens, remat=remat, paths=Paths(attention)).x
            return transformer.token_logps(params, x, tokens)[0].sum()

        return jax.jit(jax.grad(loss)).lower(params).compile()

    want = gradient("none", "whole")(params)
    assert min(np.abs(g).max() for g in jax.tree.leaves(want)) > 0
    tried = {
        remat: gradient(remat, "whole" if remat == "dots" else "blocks")
        for remat in ("dots", "full", "attention", "experts")
    }
    for program in tried.values():
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, **COMPOSED), program(params), want)
    # What attention gave is kept, so it does not run again; nor do the experts' first products.
    flops = [tried[remat].cost_analysis()["flops"] for remat in ("experts", "attention", "full")]
    assert flops[0] < flops[1] < flops[2]


# --- mixture of experts --------------------------------------------------------------------------------------------

ROUTERS = {
    "sigmoid, groups by their best two, bias": DEEPSEEK,
    "softmax, groups by their best": dataclasses.replace(
        DEEPSEEK, scoring_func="softmax", group_score="max", router_bias=False, norm_topk_prob=False
    ),
    "no groups": dataclasses.replace(DEEPSEEK, n_group=1, topk_group=1, num_experts_per_tok=3),
}


def chosen_by_force(config: ModelConfig, choice: np.ndarray) -> tuple[int, ...]:
    """The best experts of one token: every set of groups, then every set of experts in the best one."""
    groups = np.split(np.arange(config.n_routed_experts), config.n_group)
    counted = 2 if config.group_score == "top2" else 1

    def worth(kept: tuple) -> float:
        return sum(np.sort(choice[g])[-counted:].sum() for g in kept)

    kept = groups
    if config.n_group > 1:
        kept = max(itertools.combinations(groups, config.topk_group), key=worth)
    reachable = np.concatenate(kept)
    return max(itertools.combinations(reachable, config.num_experts_per_tok), key=lambda ids: choice[list(ids)].sum())


@pytest.mark.parametrize("config", ROUTERS.values(), ids=ROUTERS)
def test_moe_is_a_plain_loop_over_tokens_and_experts(config: ModelConfig) -> None:
    p = jax.tree.map(lambda a: a[0], random_params(config)["moe"]["mlp"])
    x, k = 2 * normal(2, 2, 20, 16), config.num_experts_per_tok
    replay = np.full((2, 20, k), -1)
    replay[0, 3:9] = np.random.default_rng(3).permuted(np.tile(np.arange(8), (6, 1)), axis=1)[:, :k]
    y, ids = jit(lambda p, x, replay: moe(p, config, x, replay))(p, x, replay)

    def silu(z: np.ndarray) -> np.ndarray:
        return z / (1 + np.exp(-z))

    for at in np.ndindex(2, 20):
        z = x[at] @ p["router"]
        scores = 1 / (1 + np.exp(-z)) if config.scoring_func == "sigmoid" else np.exp(z) / np.exp(z).sum()
        choice = scores + p["router_bias"] if config.router_bias else scores
        own = replay[at][0] < 0
        want_ids = chosen_by_force(config, choice) if own else replay[at]
        np.testing.assert_array_equal(np.sort(ids[at]), np.sort(want_ids))
        total = scores[list(want_ids)].sum() if config.norm_topk_prob else 1
        want = (silu(x[at] @ p["shared"]["gate"]) * (x[at] @ p["shared"]["up"])) @ p["shared"]["down"]
        for e in want_ids:
            out = (silu(x[at] @ p["gate"][e]) * (x[at] @ p["up"][e])) @ p["down"][e]
            want = want + config.routed_scaling_factor * scores[e] / total * out
        np.testing.assert_allclose(y[at], want, **COMPOSED)


def test_router_bias_and_choice_carry_no_gradient_but_gates_do() -> None:
    p = jax.tree.map(lambda a: a[0], random_params(DEEPSEEK)["moe"]["mlp"])
    x, replay = jnp.asarray(normal(0, 6, 16)), jnp.tile(jnp.array([0, 5]), (6, 1))

    def gates(p):
        return (route(p, DEEPSEEK, x, replay)[1] * normal(1, 6, 2)).sum()

    grads = jit(jax.grad(gates))({"router": p["router"], "router_bias": p["router_bias"]})
    assert not np.any(grads["router_bias"])
    assert np.abs(grads["router"][:, [0, 5]]).min() > 0 and not np.any(np.delete(grads["router"], [0, 5], axis=1))


@pytest.mark.parametrize("room", [None, 24, 200])
@pytest.mark.parametrize("assignment", ["even", "all to one", "some elsewhere"])
def test_dispatch_and_its_gradient_are_a_dense_sum_over_experts(assignment: str, room: int | None) -> None:
    n, k, experts = 128, 2, 4  # enough for blocks larger than the smallest
    rng = np.random.default_rng(0)
    ids = rng.permuted(np.tile(np.arange(experts), (n, 1)), axis=1)[:, :k]
    if assignment == "all to one":
        ids[:] = [2, 0]
    if assignment == "some elsewhere":
        ids = rng.permuted(np.tile(np.arange(-experts, 2 * experts), (n, 1)), axis=1)[:, :k]
    given = (
        normal(1, n, 6),
        normal(2, n, k),
        normal(3, experts, 6, 5),
        normal(4, experts, 6, 5),
        normal(5, experts, 5, 6),
    )
    out = normal(6, n, 6)

    def dispatched(x, gates, *w):
        if room is None:
            return (experts_local(x, jnp.asarray(ids), gates, *w) * out).sum()
        return (experts_some(x, jnp.asarray(ids), gates, w, room) * out).sum()

    def dense(x, gates, gate, up, down):
        h = jax.nn.silu(jnp.einsum("nd,edf->enf", x, gate)) * jnp.einsum("nd,edf->enf", x, up)
        share = (jax.nn.one_hot(ids, experts) * gates[..., None]).sum(1)
        return (jnp.einsum("enf,efd,ne->nd", h, down, share) * out).sum()

    got, want = (jit(jax.value_and_grad(f, argnums=(0, 1, 2, 3, 4)))(*given) for f in (dispatched, dense))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, **COMPOSED), got, want)


def test_expert_load_counts_live_assignments() -> None:
    ids = np.array([[[0, 1], [0, 2]], [[3, 0], [1, 2]]])
    load = jit(expert_load, static_argnums=2)(ids, np.array([[True, True], [True, False]]), 5)
    np.testing.assert_array_equal(load, [3, 1, 1, 1, 0])


# --- log-probabilities ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("tied", [False, True])
def test_token_logps_in_blocks_are_the_log_softmax(
    tied: bool, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, targets = normal(0, 3, 8, 16), jnp.asarray(np.random.default_rng(1).integers(0, 40, (3, 8)))
    params = {"embed": normal(2, 40, 16)} | ({} if tied else {"head": normal(3, 16, 40)})
    weights = normal(4, 3, 8)

    def blocked(params, x):
        logp, entropy = transformer.token_logps(params, x, targets, temperature)
        return (logp * weights + entropy).sum(), (logp, entropy)

    def plain(params, x):
        logp = jax.nn.log_softmax((x @ (params["embed"].T if tied else params["head"])) / temperature)
        of_target = jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]
        return (of_target * weights).sum(), (of_target, -(jnp.exp(logp) * logp).sum(-1))

    monkeypatch.setattr(vocabulary, "LOGITS_AT_ONCE", 3 * 2 * 40)
    assert "while" in jit(blocked).lower(params, x).as_text()
    (_, got), got_gradient = jit(jax.value_and_grad(blocked, argnums=(0, 1), has_aux=True))(params, x)
    (_, want), want_gradient = jit(jax.value_and_grad(plain, argnums=(0, 1), has_aux=True))(params, x)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, **CLOSE), got, want)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, **COMPOSED), got_gradient, want_gradient)


# --- layers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_linear_has_the_gradient_of_a_product(shape: tuple[int, int]) -> None:
    x, w, out = normal(0, 2, 5, shape[0]), normal(1, *shape), normal(2, 2, 5, shape[1])
    got, want = (
        jit(jax.grad(lambda x, w, f=f: (f(x, w) * out).sum(), argnums=(0, 1)))(x, w)
        for f in (layers.linear, jnp.matmul)
    )
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, **CLOSE), got, want)


@pytest.mark.parametrize("t", [5, 40, 97])
def test_attention_in_blocks_is_attention(t: int) -> None:
    q, k, v = normal(0, 2, t, 2, 3, 4), normal(1, 2, t, 2, 4), normal(2, 2, t, 2, 5)
    segments = np.sort(np.random.default_rng(3).integers(1, 4, (2, t)), axis=1)
    parents = np.where(segments == 3, 1, segments)
    mask = np.tril(np.ones((t, t), bool)) & (
        (segments[:, :, None] == segments[:, None]) | (parents[:, :, None] == segments[:, None])
    )
    got = jit(lambda q, k, v, *of: layers.attend(q, k, v, layers.attention_mask(*of).whole, 0.5))(
        q, k, v, segments, parents
    )
    scores = np.where(mask[:, None, None], np.einsum("btkgh,bskh->bkgts", q, k) * 0.5, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = np.einsum("bkgts,bskw->btkgw", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(got, want, **CLOSE)


def test_rotated_products_depend_on_the_distance_alone() -> None:
    q, k = jnp.asarray(normal(0, 1, 8)), jnp.asarray(normal(1, 1, 8))

    @jit
    def product(at_q, at_k):
        turned = [layers.rotate(a, *layers.rope_angles(Rope(theta=100.0), 8, at)) for a, at in ((q, at_q), (k, at_k))]
        return (turned[0] * turned[1]).sum()

    got = [product(np.int32(start + 3), np.int32(start)) for start in (0, 5, 40)]
    np.testing.assert_allclose(got, [got[0]] * 3, **COMPOSED)
    assert abs(product(np.int32(4), np.int32(0)) - got[0]) > 1e-2


def test_extended_ropes_keep_short_waves_and_stretch_long_ones() -> None:
    default, _ = layers.rope_frequencies(Rope(theta=1e4), 64)
    np.testing.assert_allclose(default, 1e4 ** (-np.arange(32) / 32), **CLOSE)
    for kind in ("yarn", "llama3"):
        rope = Rope(theta=1e4, kind=kind, factor=8.0, original_max_position_embeddings=1024)
        got, _ = layers.rope_frequencies(rope, 64)
        ratio = np.asarray(default / got)
        assert (np.diff(ratio) >= -1e-4).all() and len(np.unique(ratio.round(3))) > 4
        # Short waves turn so often within the original context that they need no stretching, long ones less than once.
        turns = 1024 * np.asarray(default) / (2 * np.pi)
        np.testing.assert_allclose(ratio[turns > 33], 1, **CLOSE)
        np.testing.assert_allclose(ratio[turns < 0.7], 8, **CLOSE)
    linear, _ = layers.rope_frequencies(Rope(theta=1e4, kind="linear", factor=8.0), 64)
    np.testing.assert_allclose(linear, default / 8, **CLOSE)


def test_yarn_tempers_attention_where_the_context_was_extended() -> None:
    deepseek = Rope(kind="yarn", factor=40.0, mscale=1.0, mscale_all_dim=1.0)
    # DeepSeek-V3: the temperature is in the softmax scale, not in cos and sin.
    assert layers.rope_frequencies(deepseek, 64)[1] == 1
    head = DEEPSEEK.qk_nope_head_dim + DEEPSEEK.qk_rope_head_dim
    scale = mla.softmax_scale(dataclasses.replace(DEEPSEEK, rope=deepseek))
    assert scale == pytest.approx(head**-0.5 * (0.1 * np.log(40) + 1) ** 2)
    assert mla.softmax_scale(dataclasses.replace(DEEPSEEK, rope=Rope())) == pytest.approx(head**-0.5)
    # Others: it is in cos and sin.
    assert layers.rope_frequencies(Rope(kind="yarn", factor=4.0), 64)[1] == pytest.approx(0.1 * np.log(4) + 1)
