"""PPO: generalised advantages against sums by hand, what the value model learns from, and a run that goes on."""

import contextlib
import io

import jax.numpy as jnp
import numpy as np
import pytest
from test_resume import at_call
from tiny_run import POLICY, STAGE, execute, make_config, make_policy, metrics, outcome

from r1jax import hosts, loops, run
from r1jax.studies import gae, ppo

SETTINGS = gae.PpoConfig(gae_lambda=0.8, discount=0.9, value_clip=0.2, value_learning_rate=1e-3, whiten=False)
# Rows of two and three completions behind a prompt each; 0 is a prompt's or nobody's place.
SEQUENCE = np.array([[0, 0, 1, 1, 1, 2, 2, 0, 0], [0, 3, 1, 1, 1, 1, 2, 2, 2]])
IS_COMPLETION = SEQUENCE > 0


def random(seed: int) -> np.ndarray:
    """Numbers everywhere, so that what must not be read would be seen."""
    return np.random.default_rng(seed).normal(size=SEQUENCE.shape).astype(np.float32)


def completions() -> list[tuple[int, list[int]]]:
    """Row and places of each completion."""
    return [
        (row, list(np.flatnonzero(SEQUENCE[row] == one))) for row in range(2) for one in np.unique(SEQUENCE[row]) if one
    ]


@pytest.mark.parametrize(("discount", "gae_lambda"), [(1.0, 1.0), (0.9, 0.8), (1.0, 0.95), (0.7, 0.0)])
def test_gae_is_the_sum_of_its_definition(discount, gae_lambda):
    rewards, values, wanted = random(0), random(1), np.zeros(SEQUENCE.shape)
    for row, places in completions():
        r, v = rewards[row, places], [*values[row, places], 0.0]
        for t in range(len(places)):
            wanted[row, places[t]] = sum(
                (discount * gae_lambda) ** k * (r[t + k] + discount * v[t + k + 1] - v[t + k])
                for k in range(len(places) - t)
            )
    found = gae.gae(*map(jnp.asarray, (rewards, values, IS_COMPLETION, SEQUENCE)), discount, gae_lambda)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def batch() -> dict[str, jnp.ndarray]:
    arrays = {
        "is_completion": IS_COMPLETION,
        "sequence": SEQUENCE,
        "advantage": np.where(IS_COMPLETION, 1.0 + SEQUENCE, 0.0).astype(np.float32),  # a reward for each completion
        "sampler_logp": random(2),
        "ref_logp": random(3),
    }
    return {name: jnp.asarray(a)[None] for name, a in arrays.items()}


def test_without_discount_the_value_model_learns_what_is_still_to_come():
    far = gae.PpoConfig(gae_lambda=1.0, discount=1.0, value_clip=0.2, value_learning_rate=1e-3, whiten=False)
    predicted = random(4)
    found = gae.estimates(batch(), jnp.asarray(predicted)[None], 0.1, far)
    for row, places in completions():
        penalty = 0.1 * (random(2) - random(3))[row, places]
        to_come = 1.0 + SEQUENCE[row, places[0]] - np.cumsum(penalty[::-1])[::-1]
        np.testing.assert_allclose(found["target"][0, row, places], to_come, atol=1e-5)
        np.testing.assert_allclose(found["advantage"][0, row, places], to_come - predicted[row, places], atol=1e-5)
    np.testing.assert_array_equal(found["is_valued"][0], IS_COMPLETION)


def test_whitened_advantages_have_mean_0_and_deviation_1_over_completions():
    rows = jnp.asarray(3 + 5 * random(5))[None]
    found = np.asarray(gae.whitened(rows, jnp.asarray(IS_COMPLETION)[None]))[0]
    assert abs(found[IS_COMPLETION].mean()) < 1e-6 and found[IS_COMPLETION].std() == pytest.approx(1, abs=1e-5)
    assert not found[~IS_COMPLETION].any()


def test_the_value_loss_is_the_larger_of_the_free_and_the_kept():
    micro = {"predicted": jnp.zeros(4), "target": jnp.ones(4)}
    values = jnp.array([0.1, 0.6, 1.1, -0.5])
    kept = np.clip(values, -0.2, 0.2)
    wanted = np.maximum((values - 1) ** 2, (kept - 1) ** 2) / 2
    np.testing.assert_allclose(gae.clipped_square(0.2, values, micro), wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("ppo.gae_lambda", 1.5, r"config\.ppo\.gae_lambda is 1\.5"),
        ("ppo.value_clip", 0.0, r"config\.ppo\.value_clip is 0\.0"),
        ("grpo.overlong", "soft", r"config\.grpo\.overlong is 'soft'"),
        ("rl.dynamic_sampling", True, r"config\.rl\.dynamic_sampling"),
    ],
)
def test_settings_without_a_meaning_are_refused(key, value, said, tmp_path):
    config = make_config(tmp_path, **{key.replace(".", "__"): value})
    with pytest.raises(ValueError, match=said):
        ppo.with_value_model(
            config, run.Policy(POLICY, {}, None, None), run.Run(tmp_path, 0, {"train": None}, None, None)
        )


def test_a_run_starts_on_policy_learns_values_and_goes_on_bit_for_bit(tmp_path, monkeypatch):
    make_policy(tmp_path / "policy")
    changes = {"pipeline": {STAGE: {"page": "ppo"}}, "ppo__value_learning_rate": 0.01, "rl__updates": 4}
    config = make_config(tmp_path / "policy", **changes, eval__problems=0)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        execute(config, tmp_path / "whole")
    assert "parameters and moments take 0.6 MB of the policy and 0.6 MB of the value model" in printed.getvalue()
    records = metrics(tmp_path / "whole")
    assert [r["ratio/mean"] == 1.0 for r in records] == [True, False, True, False]
    assert records[0]["loss/value"] > 0 and {"value/explained_share", "kl/mean"} <= records[-1].keys()

    stop = hosts.Stop()
    with monkeypatch.context() as patch, pytest.raises(run.Stopped):
        at_call(patch, loops, "update_metrics", 1, lambda: setattr(stop, "requested", True))
        execute(config, tmp_path / "stopped", stop)
    assert [r["step"] for r in metrics(tmp_path / "stopped")] == [1, 2]
    execute(config, tmp_path / "stopped")
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
