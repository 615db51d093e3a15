"""Laws of optim.py: schedules and AdamW against closed forms, skipped steps, the router-bias rule."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import optim

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
CONFIG = optim.OptimConfig(learning_rate=0.1, b1=0.8, b2=0.9, weight_decay=0.5, grad_clip_norm=2.0)


def tree(seed, scale=1.0):
    """Leaves with the names of the parameter tree, layers stacked: one of each kind that decay treats differently."""
    rng = np.random.default_rng(seed)

    def leaf(*shape):
        return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)

    layer = {
        "attn_norm": leaf(2, 4),
        "attn": {"q": leaf(2, 4, 2, 2), "q_bias": leaf(2, 2, 2), "kv_a_norm": leaf(2, 3)},
        "mlp": {"router": leaf(2, 4, 3), "router_bias": leaf(2, 3), "shared": {"gate": leaf(2, 4, 5)}},
    }
    return {"embed": leaf(6, 4), "norm": leaf(4), "moe": layer}


def test_constant_schedule_warms_up_linearly_from_the_first_step():
    rate = optim.schedule(optim.OptimConfig(learning_rate=3.0, warmup_steps=3))
    np.testing.assert_allclose([rate(step) for step in (0, 1, 2, 3, 900)], [1, 2, 3, 3, 3], **CLOSE)
    assert optim.schedule(optim.OptimConfig(learning_rate=3.0))(0) == 3


def test_cosine_schedule_ends_at_the_final_share():
    config = optim.OptimConfig(5e-5, warmup_steps=4, schedule="cosine", decay_steps=14, final_share=0.1)
    rate = optim.schedule(config)
    want = {3: 5e-5, 4: 5e-5, 9: 2.75e-5, 14: 5e-6, 99: 5e-6}
    np.testing.assert_allclose([rate(step) for step in want], list(want.values()), rtol=1e-5)
    np.testing.assert_allclose(rate(6), 5e-6 + 4.5e-5 * (1 + np.cos(np.pi * 0.2)) / 2, rtol=1e-5)


@functools.cache
def start():
    params = tree(0)
    optimizer = optim.make_optimizer(CONFIG, params)
    step = jax.jit(functools.partial(optim.apply, optimizer), donate_argnums=(0, 1))
    return optimizer, step


def fresh():
    optimizer, step = start()
    params = tree(0)
    return step, params, optim.init(optimizer, params)


def plain_adamw(params, all_grads):
    """The textbook, leaf by leaf in numpy; decay and training decided by a list of names written out by hand."""
    decayed = {"q", "router", "gate", "embed"}
    flat = {jax.tree_util.keystr(path): np.asarray(p, np.float64) for path, p in jax.tree.leaves_with_path(params)}
    moments = dict.fromkeys(flat, (0.0, 0.0))
    for count, grads in enumerate(all_grads, start=1):
        grads = {jax.tree_util.keystr(path): np.asarray(g, np.float64) for path, g in jax.tree.leaves_with_path(grads)}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for name, g in grads.items():
            g = g * min(1, CONFIG.grad_clip_norm / norm)
            m, v = moments[name]
            m, v = CONFIG.b1 * m + (1 - CONFIG.b1) * g, CONFIG.b2 * v + (1 - CONFIG.b2) * g**2
            moments[name] = m, v
            update = m / (1 - CONFIG.b1**count) / (np.sqrt(v / (1 - CONFIG.b2**count)) + CONFIG.eps)
            last = name.split("'")[-2]
            if last in decayed:
                update = update + CONFIG.weight_decay * flat[name]
            if last != "router_bias":
                flat[name] = flat[name] - CONFIG.learning_rate * update
    return flat


def test_apply_is_adamw_with_decay_on_matrices_alone():
    step, params, state = fresh()
    # The second is clipped (norm above 2), the first is not.
    all_grads = [tree(1, 0.01), tree(2, 1.0), tree(3, 0.1)]
    want = plain_adamw(tree(0), all_grads)
    norms = []
    for grads in all_grads:
        params, state, metrics = step(params, state, grads, jnp.float32(0))
        norms.append(metrics["optim/grad_norm"])
    for path, got in jax.tree.leaves_with_path(params):
        np.testing.assert_allclose(got, want[jax.tree_util.keystr(path)], **CLOSE)
    np.testing.assert_array_equal(params["moe"]["mlp"]["router_bias"], tree(0)["moe"]["mlp"]["router_bias"])
    want_norms = [np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads))) for grads in all_grads]
    np.testing.assert_allclose(norms, want_norms, **CLOSE)
    assert norms[0] < CONFIG.grad_clip_norm < norms[1]


def test_muon_moves_each_layers_matrix_equally_in_all_directions():
    config = dataclasses.replace(CONFIG, optimizer="muon", weight_decay=0.0)
    params, grads = tree(0), tree(1)
    optimizer = optim.make_optimizer(config, params)
    step = jax.jit(functools.partial(optim.apply, optimizer))
    new, state, _ = step(params, optim.init(optimizer, params), grads, jnp.float32(0))
    moved = jax.tree.map(lambda old, new: np.asarray(old - new) / config.learning_rate, params, new)
    # A matrix of [4, heads 2 x 2] and one of [4, 5], in both layers: singular values near 0.2 sqrt(longer side).
    for matrices in (moved["moe"]["attn"]["q"].reshape(2, 4, 4), moved["moe"]["mlp"]["shared"]["gate"]):
        values = np.linalg.svd(matrices, compute_uv=False) / (0.2 * np.sqrt(matrices.shape[-1]))
        assert values.min() > 0.5 and values.max() < 1.3, values
    np.testing.assert_array_equal(np.sign(moved["embed"]), np.sign(grads["embed"]))  # AdamW's first step
    np.testing.assert_array_equal(moved["moe"]["mlp"]["router_bias"], 0)
    got = optim.state_like(state, jax.tree.map(lambda p: f"spec of {p.shape}", params), "replicated")
    is_moment = [
        leaf == f"spec of {value.shape}" for leaf, value in zip(*map(jax.tree.leaves, (got, state)), strict=True)
    ]
    assert sum(is_moment) == 2 + 7 * 2, is_moment  # one for each matrix, AdamW's two for each other leaf


def test_zero_gradients_move_only_what_decays():
    step, params, state = fresh()
    params, _, _ = step(params, state, jax.tree.map(jnp.zeros_like, params), jnp.float32(0))
    moved = jax.tree.map(lambda new, old: bool(np.any(new != old)), params, tree(0))
    moe = {
        "attn_norm": False,
        "attn": {"q": True, "q_bias": False, "kv_a_norm": False},
        "mlp": {"router": True, "router_bias": False, "shared": {"gate": True}},
    }
    assert moved == {"embed": True, "norm": False, "moe": moe}


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["grads", "loss"])
def test_a_non_finite_step_changes_nothing_but_the_counts(where, poison):
    step, params, state = fresh()
    params, state, _ = step(params, state, tree(1), jnp.float32(0))
    kept = jax.device_get((params, state.moments))
    grads, loss = tree(2), jnp.float32(0)
    if where == "grads":
        grads["moe"]["attn"]["q"] = grads["moe"]["attn"]["q"].at[1, 0, 0, 0].set(poison)
    else:
        loss = jnp.float32(poison)
    for count in (1, 2):
        params, state, metrics = step(params, state, grads, loss)
        jax.tree.map(np.testing.assert_array_equal, (params, state.moments), kept)
        assert (state.skipped, state.skipped_in_a_row, metrics["optim/skipped"]) == (count, count, 1)
    params, state, metrics = step(params, state, tree(2), jnp.float32(0))
    assert (state.skipped, state.skipped_in_a_row, metrics["optim/skipped"]) == (2, 0, 0)
    assert np.all(np.isfinite(params["embed"])) and np.any(params["embed"] != kept[0]["embed"])


def test_too_many_skipped_steps_stop_the_run():
    optim.check_non_finite(4, limit=5)
    with pytest.raises(FloatingPointError, match="5 optimizer steps in a row .* optim.learning_rate"):
        optim.check_non_finite(5, limit=5)


def test_moments_are_float32_and_parameters_keep_their_dtype():
    params = {"embed": jnp.ones((3, 2), jnp.bfloat16), "norm": jnp.ones(2)}
    optimizer = optim.make_optimizer(CONFIG, params)
    state = optim.init(optimizer, params)
    step = jax.jit(functools.partial(optim.apply, optimizer))
    params, state, _ = step(params, state, jax.tree.map(jnp.ones_like, params), jnp.float32(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.moments)} == {"float32", "int32"}
    assert (params["embed"].dtype, params["norm"].dtype) == (jnp.bfloat16, jnp.float32)


def test_moments_in_bfloat16_make_nearly_the_same_steps():
    params, ran = tree(0), {}
    for dtype in ("float32", "bfloat16"):
        optimizer = optim.make_optimizer(dataclasses.replace(CONFIG, moments_dtype=dtype), params)
        step = jax.jit(functools.partial(optim.apply, optimizer))
        now, state = params, optim.init(optimizer, params)
        for seed in range(1, 6):
            now, state, _ = step(now, state, tree(seed), jnp.float32(1))
        moments = [a for a in jax.tree.leaves(state.moments) if a.ndim]
        assert {str(a.dtype) for a in moments} == {dtype}
        ran[dtype] = now
    far = [np.abs(a - b).max() for a, b in zip(*(jax.tree.leaves(ran[d]) for d in ran), strict=True)]
    assert 0 < max(far) < 0.01  # of five steps of 0.1


def test_state_like_puts_a_parameters_leaf_where_its_moments_are():
    optimizer, _ = start()
    state = optim.init(optimizer, tree(0))
    per_param = jax.tree.map(lambda p: f"spec of {p.shape}", tree(0))
    got = optim.state_like(state, per_param, "replicated")
    assert jax.tree.structure(got) == jax.tree.structure(state)
    for leaf, spec in zip(jax.tree.leaves(state), jax.tree.leaves(got), strict=True):
        assert spec == (f"spec of {leaf.shape}" if leaf.ndim else "replicated")


def test_router_bias_goes_up_where_load_is_low():
    bias = jnp.array([[0.5, 0.5, 0.5], [0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    load = jnp.array([[9, 0, 3], [5, 5, 5], [0, 0, 0]])
    want = [[0.499, 0.501, 0.501], [0, 0, 0], [1, 2, 3]]
    np.testing.assert_allclose(optim.router_bias_update(bias, load, 0.001), want, **CLOSE)


def test_router_bias_rule_balances_a_skewed_router():
    scores = np.random.default_rng(0).normal(size=(256, 4)) + np.array([2.0, 0.0, 0.0, -1.0])
    bias = jnp.zeros((1, 4))
    for _ in range(60):
        chosen = np.argmax(scores + np.asarray(bias), axis=1)
        bias = optim.router_bias_update(bias, jnp.bincount(chosen, length=4)[None], 0.05)
    load = np.bincount(np.argmax(scores + np.asarray(bias), axis=1), minlength=4)
    assert np.all(np.abs(load - 64) < 16), load


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": "cosin"}, "optim.schedule is 'cosin', wanted one of constant, cosine; did you mean 'cosine'"),
        ({"schedule": "cosine", "warmup_steps": 5, "decay_steps": 5}, "optim.decay_steps above optim.warmup_steps"),
        ({"learning_rate": -1.0}, "optim.learning_rate"),
        ({"grad_clip_norm": 0.0}, "optim.grad_clip_norm"),
        ({"b2": 1.0}, "optim.b2"),
    ],
)
def test_a_wrong_setting_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        optim.OptimConfig(**values)
