"""Laws of the draws: right frequencies, right supports, and nothing but its own name decides a token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import jit

from r1jax.draw import DrawConfig, draw, kept, sample_keys, uniforms

LOGITS = np.random.default_rng(0).normal(0, 1.5, (1, 12)).astype(np.float32)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kept_by_hand(z: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """One row: the likeliest top_k, of those the fewest whose share reaches top_p."""
    order = np.argsort(-z)[: top_k or len(z)]
    share = np.cumsum(softmax(z[order]))
    out = np.zeros(len(z), bool)
    out[order[: int(np.searchsorted(share, top_p)) + 1]] = True
    return out


@pytest.mark.parametrize(
    "config", [DrawConfig(), DrawConfig(0.6), DrawConfig(top_k=5), DrawConfig(1.3, 8, 0.8)], ids=str
)
def test_frequencies_are_the_probabilities(config: DrawConfig) -> None:
    n = 20_000
    named = jit(lambda prompts, members, places: uniforms(sample_keys(jax.random.key(1), prompts, members), places))
    u = named(np.arange(n) // 100, np.arange(n) % 100, np.arange(n) % 7)
    token, logp = jit(lambda u: draw(jnp.broadcast_to(LOGITS, (n, 12)), u, config))(u)
    tempered = LOGITS[0] / config.temperature
    p = np.where(kept_by_hand(tempered, config.top_k, config.top_p), softmax(tempered), 0)
    p, counts = p / p.sum(), np.bincount(token, minlength=12)
    assert not counts[p == 0].any()
    # 99.9% of true samples stay below: chi-square with 11 degrees of freedom or fewer.
    assert ((counts - n * p) ** 2 / np.maximum(n * p, 1e-9))[p > 0].sum() < 31.3
    np.testing.assert_allclose(logp, np.log(softmax(tempered))[token], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 4, 50])
def test_top_k_and_top_p_keep_what_they_say(top_k: int, top_p: float) -> None:
    z = np.random.default_rng(3).normal(0, 2, (40, 12)).astype(np.float32)
    got = jit(lambda z: kept(z, DrawConfig(top_k=top_k, top_p=top_p)))(z)
    np.testing.assert_array_equal(got, [kept_by_hand(row, top_k, top_p) for row in z])
    assert got[np.arange(40), z.argmax(-1)].all()


def test_temperature_zero_is_greedy_and_tells_the_untempered_log_probability() -> None:
    z = np.random.default_rng(3).normal(size=(5, 12)).astype(np.float32)
    token, logp = jit(lambda z, u: draw(z, u, DrawConfig(temperature=0.0)))(
        z, np.linspace(0, 0.99, 5, dtype=np.float32)
    )
    np.testing.assert_array_equal(token, z.argmax(-1))
    np.testing.assert_allclose(logp, np.log(softmax(z)).max(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocab", [512, 4096])
def test_a_token_of_zero_probability_is_never_drawn(vocab: int) -> None:
    # A parallel cumulative sum is rounded in another order at every entry: its steps are met from both sides.
    rng = np.random.default_rng(0)
    z = np.full((1, vocab), -np.inf, np.float32)
    support = rng.choice(np.arange(1, vocab - 1), 40, replace=False)
    z[0, support] = rng.normal(size=40)
    edges = np.cumsum(softmax(z)[0, np.sort(support)].astype(np.float32))
    ulps = np.arange(-8, 9) * np.float32(2**-24)
    u = np.concatenate([[0.0, 1 - 2**-23], (edges[:, None] + ulps).ravel()]).astype(np.float32)
    u = u[u <= 1 - 2**-23]  # the largest that jax.random.uniform returns
    token, logp = jit(lambda u: draw(jnp.broadcast_to(z, (len(u), vocab)), u, DrawConfig()))(u)
    assert np.isin(token, support).all() and np.isfinite(logp).all()
    assert set(np.asarray(token)) == set(support)


def test_a_draw_does_not_depend_on_its_place_in_the_batch() -> None:
    key, rng = jax.random.key(5), np.random.default_rng(0)
    prompts, members, places = rng.integers(0, 4, 30), rng.integers(0, 4, 30), rng.integers(0, 4, 30)
    z, order = rng.normal(size=(30, 12)).astype(np.float32), rng.permutation(30)

    @jit
    def one(z, prompts, members, places):
        u = uniforms(sample_keys(key, prompts, members), places)
        return u, draw(z, u, DrawConfig(top_p=0.9))

    (u, there), (_, here) = one(z, prompts, members, places), one(*(a[order] for a in (z, prompts, members, places)))
    for a, b in zip(there, here, strict=True):
        np.testing.assert_array_equal(a[order], b)
    # Equal names give equal numbers, different names different ones.
    names = np.stack([prompts, members, places], axis=1)
    assert len(np.unique(u)) == len(np.unique(names, axis=0)) < 30


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
    ],
)
def test_impossible_settings_are_named(fields: dict, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said} is .* wanted"):
        DrawConfig(**fields)
