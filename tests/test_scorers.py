"""Reward models: their losses against closed forms, what they learn, and that a kept one scores as it did."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QWEN as DENSE
from tiny_run import POLICY

from configs import base
from r1jax import optim, run, scorers, sharding, updates
from r1jax.corpus import MIXTURES
from r1jax.folders import folder_at
from r1jax.model import transformer
from r1jax.preference import rows_of
from r1jax.text import load_tokenizer

T = 12
LAYOUT = sharding.layouts(sharding.make_mesh({}, jax.devices()[:1]))["train"]
PROGRAM = updates.Program(config=DENSE, layout=LAYOUT)


def texts(n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random rows [n, T] of 3 to T tokens."""
    lengths = rng.integers(3, T + 1, n)
    segments = (np.arange(T) < lengths[:, None]).astype(np.int32)
    return {
        "tokens": rng.integers(4, DENSE.vocab_size, (n, T)).astype(np.int32) * segments,
        "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (n, T)).copy(),
        "segments": segments,
        "parents": segments,
        "is_last": np.arange(T) == lengths[:, None] - 1,
    }


def params() -> dict:
    head = jax.random.normal(jax.random.key(1), (DENSE.hidden_size,))
    return {"trunk": transformer.init(DENSE, jax.random.key(0)), "score": head}


def scores_by_hand(weights: dict, rows: dict[str, np.ndarray]) -> np.ndarray:
    """Each row read alone, without padding."""
    out = []
    for tokens, n in zip(rows["tokens"], rows["segments"].sum(1), strict=True):
        x = transformer.hidden(weights["trunk"], DENSE, jnp.asarray(tokens[None, :n])).x
        out.append(float(x[0, -1] @ weights["score"]))
    return np.array(out)


def test_a_score_is_read_at_the_last_token_and_empty_rows_have_none():
    rows = texts(3, np.random.default_rng(0))
    found = updates.make_reward_score(PROGRAM)(params(), scorers.batches(rows, 4, LAYOUT))
    np.testing.assert_allclose(found[0], [*scores_by_hand(params(), rows), 0.0], atol=1e-5)


@pytest.mark.parametrize("loss", list(updates.REWARD_LOSSES))
def test_losses_equal_their_formulas_and_accumulated_equals_whole(loss):
    rows = texts(8, np.random.default_rng(1))
    label = np.array([1, 0, 1, 1, 0, 0, 1, 0], np.float32)
    if loss == "pointwise":
        rows["label"] = np.where(rows["is_last"], label[:, None], 0.0).astype(np.float32)
    scores = scores_by_hand(params(), rows)
    gaps = scores[0::2] - scores[1::2]
    wanted = np.log1p(np.exp(-gaps)) if loss == "pairwise" else np.log1p(np.exp(-scores * (2 * label - 1)))
    optimizer = optim.make_optimizer(optim.OptimConfig(learning_rate=1e-3), params())
    update, ends = updates.make_reward_update(PROGRAM, optimizer, loss), []
    for size in (8, 4):
        state, sums = update(updates.init_state(params(), optimizer), scorers.batches(rows, size, LAYOUT), 8 // size)
        assert float(sums["loss"]) == pytest.approx(wanted.mean(), abs=1e-5) and float(sums["rows"]) == 8
        ends.append(np.asarray(state["policy"]["score"]))
    np.testing.assert_allclose(*ends, atol=1e-5)


def test_a_reward_model_learns_what_pairs_say_and_its_measures_are_those_of_its_scores():
    rng = np.random.default_rng(2)

    def pairs(n: int) -> dict[str, np.ndarray]:
        rows = texts(n, rng)
        rows["tokens"][0::2, 0], rows["tokens"][1::2, 0] = 5, 6  # what is chosen begins with another token
        return rows

    optimizer = optim.make_optimizer(optim.OptimConfig(learning_rate=1e-2), params())
    update, state = updates.make_reward_update(PROGRAM, optimizer, "pairwise"), updates.init_state(params(), optimizer)
    for _ in range(40):
        state, _ = update(state, scorers.batches(pairs(64), 64, LAYOUT), 1)
    fresh = pairs(32)
    scores = np.asarray(updates.make_reward_score(PROGRAM)(state["policy"], scorers.batches(fresh, 32, LAYOUT))[0])
    found = scorers.measured(scores, "pairwise", fresh)
    assert found["eval/accuracy"] == (scores[0::2] > scores[1::2]).mean() > 0.9
    assert found["eval/length_correlation"] == pytest.approx(np.corrcoef(scores, fresh["segments"].sum(1))[0, 1])
    assert scorers.correlation(np.ones(4), np.arange(4.0)) == 0.0


def test_a_kept_reward_model_scores_as_it_did(tmp_path, caplog):
    tokenizer = load_tokenizer(MIXTURES["english"].base)
    trunk = transformer.init(POLICY, jax.random.key(0))
    weights = {"trunk": trunk, "score": jax.random.normal(jax.random.key(1), (POLICY.hidden_size,))}
    policy = run.Policy(POLICY, trunk, tokenizer, folder_at(MIXTURES["english"].base))
    scorers.save(tmp_path / "helpful", policy, weights, {"eval/accuracy": 0.9})
    this = run.Run(tmp_path, 0, {"train": LAYOUT}, None, None)
    config = base.get_config()
    config.preference.update({"row_tokens": 48, "rows": 4})
    asked = [("Using 1, 2, 3", " <answer>6</answer>"), ("too long", "a" * 90), ("", " yes")]
    score = scorers.load(this, config, tmp_path / "helpful", policy)
    with caplog.at_level("WARNING", "absl"):
        found = score(asked)
    assert "1 of 3 texts so far are longer than config.preference.row_tokens" in caplog.text
    rows, fits = rows_of(asked, tokenizer, config.data.template, 48)
    program = dataclasses.replace(PROGRAM, config=POLICY)
    scores = updates.make_reward_score(program)(weights, scorers.batches(rows, 4, LAYOUT))[0][:3]
    np.testing.assert_allclose(found, np.where(fits, 1 / (1 + np.exp(-scores)), 0.0), atol=1e-6)
    assert found[1] == 0.0 < found[0] != found[2]
    with pytest.raises(ValueError, match=r"nothing holds no reward model .*config\.preference\.models"):
        scorers.load(this, config, pathlib.Path(tmp_path / "nothing"), policy)
