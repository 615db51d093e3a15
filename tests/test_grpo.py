"""Laws of grpo.py: every estimator and every aggregation against a closed form or a plain loop over unpadded lists."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import grpo

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# Tiny programs: compiling them is all the time there is, and optimizing them most of that.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
advantages = jit(grpo.advantages, static_argnames=("normalize_std", "ddof"))


# --- groups --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("normalize_std", [True, False])
def test_advantages_are_the_closed_form(normalize_std, ddof):
    rewards = np.random.default_rng(0).integers(0, 3, (5, 8)).astype(np.float32)
    want = rewards - rewards.mean(1, keepdims=True)
    if normalize_std:
        want = want / (rewards.std(1, ddof=ddof, keepdims=True) + 1e-6)
    np.testing.assert_allclose(advantages(rewards, normalize_std, ddof), want, **CLOSE)


@pytest.mark.parametrize("size", [1, 7, 16])
def test_equal_rewards_give_exactly_zero(size):
    values = np.concatenate([[0.1, 1 / 3, -1e6], np.random.default_rng(2).normal(size=500)])
    rewards = np.repeat(values[:, None], size, axis=1).astype(np.float32)
    assert not np.any(advantages(rewards)) and not np.any(advantages(rewards, normalize_std=False))
    assert np.all(grpo.zero_variance(rewards))


@hypothesis.given(st.lists(st.floats(-4, 4, width=32), min_size=6, max_size=6), st.permutations(range(6)))
@hypothesis.settings(max_examples=30, deadline=None)
def test_permuting_a_group_permutes_its_advantages(group, order):
    rewards = np.asarray([group], np.float32)
    want = np.asarray(advantages(rewards))[:, order]
    np.testing.assert_allclose(advantages(rewards[:, order]), want, **CLOSE)


def test_invalid_members_neither_get_nor_move_an_advantage():
    rewards = np.array([[1, 0, np.nan, 1], [3, 3, 7, 3], [5, 0, 0, 0]], np.float32)
    is_valid = np.array([[1, 1, 0, 1], [1, 1, 0, 1], [0, 0, 0, 0]], bool)
    got = advantages(rewards, is_valid=is_valid)
    np.testing.assert_allclose(got[0, [0, 1, 3]], advantages(rewards[:1, [0, 1, 3]])[0], **CLOSE)
    assert not np.any(got[~is_valid]) and not np.any(got[1:])
    np.testing.assert_array_equal(grpo.zero_variance(rewards, is_valid), [False, True, True])


def test_dynamic_sampling_keeps_the_first_groups_with_a_signal():
    rewards = np.array([[0, 0], [0, 1], [1, 1], [1, 0], [2, 1]], np.float32)
    has_signal = ~grpo.zero_variance(rewards)
    np.testing.assert_array_equal(grpo.keep_groups(has_signal, limit=9), [0, 1, 0, 1, 1])
    np.testing.assert_array_equal(grpo.keep_groups(has_signal, limit=2), [0, 1, 0, 1, 0])


@pytest.mark.parametrize(
    ("overlong", "rewards", "is_trained"),
    [
        ("none", [1, 1, 1, 1], [1, 1, 1, 1]),
        ("mask", [1, 1, 1, 1], [1, 1, 1, 0]),
        ("soft", [1, 1, 0.5, 0], [1, 1, 1, 1]),
    ],
)
def test_overlong_completions(overlong, rewards, is_trained):
    lengths, is_truncated = np.array([[10, 80, 90, 100]]), np.array([[False, False, False, True]])
    got = grpo.handle_overlong(
        overlong, np.ones((1, 4)), lengths, is_truncated, max_completion_tokens=100, soft_tokens=20
    )
    np.testing.assert_allclose(got[0], [rewards], **CLOSE)
    np.testing.assert_array_equal(got[1], [is_trained])


# --- KL estimators, against the exact divergences of a small categorical -------------------------------------------

LOGITS, OLD, REF = np.random.default_rng(1).normal(size=(3, 7)).astype(np.float32)


def exact_kl(p_logits, q_logits):
    p, q = jax.nn.log_softmax(p_logits), jax.nn.log_softmax(q_logits)
    return jnp.sum(jnp.exp(p) * (p - q))


def expected_kl(name, logits, old_logits):
    """The estimator's expectation over tokens drawn from old: exact, by enumeration."""
    logp, old, ref = (jax.nn.log_softmax(x) for x in (logits, old_logits, REF))
    return jnp.sum(jnp.exp(old) * grpo.KL_ESTIMATORS[name](logp, old, ref))


def half_squared(logits):
    logp, ref = jax.nn.log_softmax(logits), jax.nn.log_softmax(REF)
    return jnp.sum(jnp.exp(logp) * (logp - ref) ** 2) / 2


@pytest.mark.parametrize(
    ("name", "old", "value", "gradient_of"),
    [
        ("k1", LOGITS, exact_kl(LOGITS, REF), lambda x: 0 * x.sum()),
        ("k2", LOGITS, half_squared(LOGITS), lambda x: exact_kl(x, REF)),
        ("k3", LOGITS, exact_kl(LOGITS, REF), lambda x: exact_kl(REF, x)),
        ("k3_corrected", LOGITS, exact_kl(LOGITS, REF), lambda x: exact_kl(x, REF)),
        ("k3_corrected", OLD, exact_kl(LOGITS, REF), lambda x: exact_kl(x, REF)),
    ],
)
def test_kl_estimators_have_the_stated_value_and_gradient(name, old, value, gradient_of):
    got, gradient = jax.value_and_grad(lambda x: expected_kl(name, x, old))(LOGITS)
    np.testing.assert_allclose(got, value, **CLOSE)
    np.testing.assert_allclose(gradient, jax.grad(gradient_of)(LOGITS), **CLOSE)


@pytest.mark.parametrize("name", grpo.KL_ESTIMATORS)
def test_kl_of_equals_is_zero_and_of_extremes_finite(name):
    logp = jnp.array([0.0, -3.0, -900.0, 0.0])
    ref = jnp.array([0.0, -3.0, 0.0, -900.0])
    value, gradient = jax.value_and_grad(lambda x: grpo.KL_ESTIMATORS[name](x, ref, ref).sum())(logp)
    assert not np.any(grpo.KL_ESTIMATORS[name](logp, ref, ref)[:2])
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


# --- the clipped objective -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "low", "high"),
    [(0.5, -1, 1, 0), (0.5, 1, 0, 0), (2.0, 1, 0, 1), (2.0, -1, 0, 0), (1.0, 1, 0, 0), (1.0, -1, 0, 0), (2.0, 0, 0, 0)],
)
def test_clipping_binds_by_the_sign_of_the_advantage(ratio, advantage, low, high):
    ratio, advantage = jnp.full((1, 1), ratio), jnp.full((1, 1), float(advantage))
    got = grpo.clipped_objective(ratio, advantage, 0.1, 0.3)
    want = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.9, 1.3) * advantage)
    np.testing.assert_allclose(got.objective, want, **CLOSE)
    assert (got.is_low.item(), got.is_high.item()) == (low, high)
    gradient = jax.grad(lambda r: grpo.clipped_objective(r, advantage, 0.1, 0.3).objective.sum())(ratio)
    np.testing.assert_allclose(gradient, 0 if low or high else advantage, **CLOSE)


def test_clip_eps_zero_keeps_the_whole_gradient_on_policy():
    advantage = jnp.array([[2.0, -2.0]])
    gradient = jax.grad(lambda r: grpo.clipped_objective(r, advantage, 0.0, 0.0).objective.sum())(jnp.ones((1, 2)))
    np.testing.assert_array_equal(gradient, advantage)


# --- the loss: a plain loop over lists is the reference ------------------------------------------------------------

LENGTHS, MAX_TOKENS = (3, 1, 6, 2, 4), 8
PACKED, PADDED = ((0, 1), (2,), (3, 4)), ((0,), (1,), (2,), (3,), (4,))


def random_sequences(seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            "logp": -rng.exponential(size=n),
            "old_logp": -rng.exponential(size=n),
            "ref_logp": -rng.exponential(size=n),
            "sampler_logp": -rng.exponential(size=n),
            "advantage": rng.normal(),
        }
        for n in LENGTHS
    ]


def lay_out(sequences, rows, settings, width=14, fill=0.0):
    """LossInputs of a minibatch: each sequence after a prompt of two tokens, `fill` wherever no completion stands."""
    shape = (len(rows), width)
    fields = {name: np.full(shape, fill, np.float32) for name in grpo.LossInputs._fields[:-3]}
    is_completion, sequence, lengths = np.zeros(shape, bool), np.full(shape, -7), np.zeros(shape, int)
    for row, members in enumerate(rows):
        start = 0
        for number, member in enumerate(members):
            n = len(sequences[member]["logp"])
            here = np.s_[row, start + 2 : start + 2 + n]
            for name, field in fields.items():
                field[here] = sequences[member][name]
            is_completion[here], sequence[here], lengths[here] = True, number, n
            start += 2 + n
    total = sum(len(s["logp"]) for s in sequences)
    weights = grpo.token_weights(settings.aggregation, lengths, len(sequences), total, MAX_TOKENS)
    inputs = grpo.LossInputs(**fields, weights=weights, is_completion=is_completion, sequence=sequence)
    return jax.tree.map(jnp.asarray, inputs)


def plain_loss(sequences, settings):
    """The formulas as written in the papers, one sequence and one token at a time, in float64."""
    kl_of = {
        "k1": lambda p, o, r: p - r,
        "k2": lambda p, o, r: (p - r) ** 2 / 2,
        "k3": lambda p, o, r: np.exp(r - p) - (r - p) - 1,
        "k3_corrected": lambda p, o, r: np.exp(p - o) * (np.exp(r - p) - (r - p) - 1),
    }[settings.kl_estimator]
    policy_terms, kl_terms = [], []
    for s in sequences:
        n = len(s["logp"])
        log_ratios = s["logp"] - s["old_logp"]
        sequence_log_ratio = sum(log_ratios) / (n if settings.ratio_level == "sequence_mean" else 1)
        terms = []
        for t in range(n):
            ratio = np.exp(log_ratios[t] if settings.ratio_level == "token" else sequence_log_ratio)
            clipped = min(max(ratio, 1 - settings.clip_eps_low), 1 + settings.clip_eps_high)
            weight = 1.0
            if settings.importance_cap is not None:
                weight = min(np.exp(s["old_logp"][t] - s["sampler_logp"][t]), settings.importance_cap)
            terms.append(weight * min(ratio * s["advantage"], clipped * s["advantage"]))
        policy_terms.append(terms)
        kl_terms.append([kl_of(s["logp"][t], s["old_logp"][t], s["ref_logp"][t]) for t in range(n)])

    def mean_over_sequences(values):
        return sum(values) / len(sequences)

    def aggregate(terms):
        return {
            "per_sequence_token_mean": lambda: mean_over_sequences([sum(x) / len(x) for x in terms]),
            "token_mean": lambda: sum(sum(x) for x in terms) / sum(len(x) for x in terms),
            "constant_length": lambda: mean_over_sequences([sum(x) / MAX_TOKENS for x in terms]),
            "sequence": lambda: mean_over_sequences([sum(x) for x in terms]),
        }[settings.aggregation]()

    policy = aggregate(policy_terms)
    if settings.aggregation == "sequence" and settings.ratio_level != "token":
        policy = mean_over_sequences([sum(x) / len(x) for x in policy_terms])  # one term per sequence
    return -policy + settings.kl_coef * aggregate(kl_terms)


@functools.partial(jit, static_argnames=("settings", "row_sequences"))
def loss_and_gradient(inputs, settings, row_sequences=2):
    def of_logp(logp):
        return grpo.loss(inputs._replace(logp=logp), settings, row_sequences)

    (value, sums), gradient = jax.value_and_grad(of_logp, has_aux=True)(inputs.logp)
    return value, sums, gradient


def numeric_gradient(sequences, settings, step=1e-6):
    gradients = []
    for s in sequences:
        for t in range(len(s["logp"])):
            kept, ends = s["logp"][t], []
            for sign in (1, -1):
                s["logp"][t] = kept + sign * step
                ends.append(plain_loss(sequences, settings))
            s["logp"][t] = kept
            gradients.append((ends[0] - ends[1]) / (2 * step))
    return gradients


def config(aggregation, ratio_level):
    # Few different settings in this file: each is a program to compile.
    return grpo.GrpoConfig(0.3, "k3_corrected", 0.2, 0.4, ratio_level, aggregation, importance_cap=1.5)


SETTINGS = config("sequence", "sequence")


@pytest.mark.parametrize("ratio_level", grpo.RATIO_LEVELS)
@pytest.mark.parametrize("aggregation", grpo.AGGREGATIONS)
def test_every_aggregation_and_ratio_equals_the_plain_loop(aggregation, ratio_level):
    settings = config(aggregation, ratio_level)
    sequences = random_sequences()
    inputs = lay_out(sequences, PACKED, settings)
    value, _, gradient = loss_and_gradient(inputs, settings)
    np.testing.assert_allclose(value, plain_loss(sequences, settings), **CLOSE)
    np.testing.assert_allclose(gradient[inputs.is_completion], numeric_gradient(sequences, settings), **CLOSE)


@pytest.mark.parametrize("kl_estimator", ["k1", "k2", "k3"])
def test_every_kl_term_equals_the_plain_loop(kl_estimator):
    settings = grpo.GrpoConfig(0.5, kl_estimator, ratio_level="sequence_mean")
    sequences = random_sequences(3)
    inputs = lay_out(sequences, PACKED, settings)
    value, _, gradient = loss_and_gradient(inputs, settings)
    np.testing.assert_allclose(value, plain_loss(sequences, settings), **CLOSE)
    np.testing.assert_allclose(gradient[inputs.is_completion], numeric_gradient(sequences, settings), **CLOSE)


def assert_same(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), left, right)


def test_packed_equals_padded():
    sequences = random_sequences(1)
    packed, padded = (lay_out(sequences, rows, SETTINGS) for rows in (PACKED, PADDED))
    value, sums, gradient = loss_and_gradient(packed, SETTINGS)
    want_value, want_sums, want_gradient = loss_and_gradient(padded, SETTINGS)
    assert_same((value, sums), (want_value, want_sums))
    np.testing.assert_allclose(gradient[packed.is_completion], want_gradient[padded.is_completion], **CLOSE)


@pytest.mark.parametrize("aggregation", grpo.AGGREGATIONS)
def test_accumulated_equals_whole(aggregation):
    settings = config(aggregation, "sequence")
    inputs = lay_out(random_sequences(2), PACKED, settings)
    value, sums, gradient = loss_and_gradient(inputs, settings)
    rows = [grpo.LossInputs(*(np.asarray(field)[i : i + 1] for field in inputs)) for i in range(len(PACKED))]
    parts = [loss_and_gradient(row, settings) for row in rows]
    np.testing.assert_allclose(sum(part[0] for part in parts), value, **CLOSE)
    np.testing.assert_allclose(np.concatenate([part[2] for part in parts]), gradient, **CLOSE)
    accumulated = functools.reduce(grpo.accumulate, [part[1] for part in parts], jax.tree.map(jnp.zeros_like, sums))
    assert_same(grpo.finish_metrics(accumulated), grpo.finish_metrics(sums))


@pytest.mark.parametrize("ratio_level", grpo.RATIO_LEVELS)
def test_the_first_ratio_is_exactly_one(ratio_level):
    settings = grpo.GrpoConfig(0.0, clip_eps_low=0.0, clip_eps_high=0.0, ratio_level=ratio_level)
    inputs = lay_out(random_sequences(), PACKED, settings)
    inputs = inputs._replace(old_logp=inputs.logp)
    _, sums, gradient = loss_and_gradient(inputs, settings)
    metrics = grpo.finish_metrics(sums)
    assert metrics["ratio/mean"] == metrics["ratio/max"] == 1
    assert metrics["clip/low_share"] == metrics["clip/high_share"] == 0
    if ratio_level == "token":
        np.testing.assert_array_equal(gradient, np.where(inputs.is_completion, -inputs.weights * inputs.advantage, 0))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_what_stands_outside_completions_does_not_matter(poison, ratio_level):
    settings = config("sequence", ratio_level)
    clean = lay_out(random_sequences(), PACKED, settings)
    poisoned = lay_out(random_sequences(), PACKED, settings, fill=poison)
    poisoned = poisoned._replace(weights=jnp.where(clean.is_completion, clean.weights, poison))
    want, got = loss_and_gradient(clean, settings), loss_and_gradient(poisoned, settings)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert np.all(np.isfinite(got[2])) and not np.any(got[2][~clean.is_completion])


def test_a_non_finite_completion_token_is_not_hidden():
    inputs = lay_out(random_sequences(), PACKED, SETTINGS)
    logp = np.where(np.cumsum(inputs.is_completion).reshape(inputs.logp.shape) == 4, np.nan, inputs.logp)
    assert not np.isfinite(loss_and_gradient(inputs._replace(logp=logp), SETTINGS)[0])


def test_metrics_are_those_of_a_plain_loop():
    settings = grpo.GrpoConfig(0.1, "k3", 0.2, 0.3, importance_cap=1.2)
    sequences = random_sequences(5)
    _, sums, _ = loss_and_gradient(lay_out(sequences, PACKED, settings), settings)
    logp, old, ref, sampler = (
        np.concatenate([s[name] for s in sequences]) for name in ("logp", "old_logp", "ref_logp", "sampler_logp")
    )
    advantage, ratio = np.repeat([s["advantage"] for s in sequences], LENGTHS), np.exp(logp - old)
    want = {
        "kl/mean": np.mean(np.exp(ref - logp) - (ref - logp) - 1),
        "clip/low_share": np.mean((ratio < 0.8) & (advantage < 0)),
        "clip/high_share": np.mean((ratio > 1.3) & (advantage > 0)),
        "ratio/mean": ratio.mean(),
        "ratio/max": ratio.max(),
        "mismatch/mean_abs": np.abs(old - sampler).mean(),
        "mismatch/max": np.abs(old - sampler).max(),
        "importance/truncated_share": np.mean(np.exp(old - sampler) > 1.2),
        "loss/policy": plain_loss(sequences, dataclasses.replace(settings, kl_coef=0.0)),
    }
    got = grpo.finish_metrics(sums)
    assert got.keys() == want.keys()
    assert_same(got, {name: np.float32(value) for name, value in want.items()})


def test_nothing_but_logp_carries_a_gradient():
    inputs = lay_out(random_sequences(), PACKED, SETTINGS)

    def of_the_rest(rest):
        return grpo.loss(inputs._replace(**rest), SETTINGS, 2)[0]

    rest = {name: inputs._asdict()[name] for name in ("old_logp", "ref_logp", "sampler_logp", "advantage")}
    assert not any(np.any(g) for g in jax.tree.leaves(jit(jax.grad(of_the_rest))(rest)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kl_estimator": "k4"}, "grpo.kl_estimator is 'k4', wanted one of k1, k2, k3, k3_corrected"),
        ({"aggregation": "token_means"}, "grpo.aggregation .* did you mean 'token_mean'"),
        ({"ratio_level": "tokens"}, "grpo.ratio_level .* did you mean 'token'"),
        ({"overlong": "masked"}, "grpo.overlong .* did you mean 'mask'"),
        ({"overlong": "soft"}, "grpo.overlong_soft_tokens"),
        ({"kl_coef": -1.0}, "grpo.kl_coef"),
        ({"clip_eps_low": float("nan")}, "grpo.clip_eps_low"),
        ({"importance_cap": 0.0}, "grpo.importance_cap"),
    ],
)
def test_a_wrong_setting_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        grpo.GrpoConfig(**values)


def test_a_kl_term_without_a_reference_is_refused():
    inputs = lay_out(random_sequences(), PACKED, SETTINGS)._replace(ref_logp=None)
    with pytest.raises(ValueError, match="grpo.kl_coef"):
        loss_and_gradient(inputs, SETTINGS)
    _, sums, _ = loss_and_gradient(inputs, dataclasses.replace(SETTINGS, kl_coef=0.0))
    assert "kl/mean" not in grpo.finish_metrics(sums)
