"""Laws of minibatches: baselines are the whole group's, a split loses nobody, weights count what is trained."""

import dataclasses

import numpy as np
import pytest
from tiny import DEEPSEEK, made_sample, random_completion

from r1jax import grpo, minibatches
from r1jax.minibatches import Shape, Trained

LIMIT = 12
SHAPE = Shape(row_tokens=24, rows=4, share_prompt=True, replay=True)
PROMPTS = ((5, 6, 7), (3,))


def groups(size: int = 4) -> list[list]:
    rng = np.random.default_rng(0)
    out = []
    for i, ids in enumerate(PROMPTS):
        lengths = rng.integers(1, LIMIT + 1, size)
        lengths[0] = LIMIT
        completions = [random_completion(DEEPSEEK, rng, i, m, len(ids), int(n)) for m, n in enumerate(lengths)]
        completions[0] = dataclasses.replace(completions[0], stop="length")
        out.append([made_sample(ids, c, reward=float(rng.integers(0, 2))) for c in completions])
    return out


def test_advantages_are_those_of_the_group_before_any_split() -> None:
    made, settings = groups(), grpo.GrpoConfig(normalize_std=False)
    items = minibatches.with_advantages(made, settings, LIMIT)
    for row, group in zip(items, made, strict=True):
        rewards = np.array([s.graded.reward for s in group])
        np.testing.assert_allclose([i.advantage for i in row], rewards - rewards.mean(), rtol=1e-5, atol=1e-6)
        assert [i.sample for i in row] == group and all(i.is_trained for i in row)


def test_masked_completions_count_in_the_baseline_alone() -> None:
    made = groups()
    plain = minibatches.with_advantages(made, grpo.GrpoConfig(), LIMIT)
    masked = minibatches.with_advantages(made, grpo.GrpoConfig(overlong="mask"), LIMIT)
    for row, other in zip(masked, plain, strict=True):
        assert [i.advantage for i in row] == [i.advantage for i in other]
        assert [i.is_trained for i in row] == [i.sample.completion.stop == "stop" for i in row]


def test_a_split_is_random_equal_and_loses_nobody() -> None:
    items = [Trained(s, 0.0, True) for group in groups() for s in group]
    parts = minibatches.split(items, 4, (1, 2))
    assert [len(part) for part in parts] == [2] * 4
    assert {id(i) for part in parts for i in part} == {id(i) for i in items}
    again, other = minibatches.split(items, 4, (1, 2)), minibatches.split(items, 4, (1, 3))
    assert all(a is b for x, y in zip(parts, again, strict=True) for a, b in zip(x, y, strict=True))
    assert any(a is not b for x, y in zip(parts, other, strict=True) for a, b in zip(x, y, strict=True))
    with pytest.raises(ValueError, match=r"8 completions do not split into config.rl.minibatches = 3"):
        minibatches.split(items, 3, (1,))


@pytest.mark.parametrize("aggregation", grpo.AGGREGATIONS)
def test_weights_add_up_to_what_is_trained(aggregation: str) -> None:
    settings = grpo.GrpoConfig(overlong="mask", aggregation=aggregation)
    items = [i for row in minibatches.with_advantages(groups(), settings, LIMIT) for i in row]
    batch, n = minibatches.pack(items, SHAPE, settings, LIMIT)
    lengths = [len(i.sample.completion.tokens) for i in items if i.is_trained]
    want = {
        "sequence": sum(lengths) / len(lengths),
        "per_sequence_token_mean": 1,
        "token_mean": 1,
        "constant_length": sum(lengths) / (len(lengths) * LIMIT),
    }
    assert len(lengths) == 6
    assert batch["weights"].sum() == pytest.approx(want[aggregation], rel=1e-5)
    assert batch["is_completion"].sum() == sum(lengths)
    np.testing.assert_array_equal(batch["weights"] > 0, batch["is_completion"])
    assert not any(a[n:].any() for a in batch.values())


def test_each_token_brings_its_own_numbers() -> None:
    items = [Trained(s, float(k), True) for k, s in enumerate(s for group in groups() for s in group)]
    batch, n = minibatches.pack(items, SHAPE, grpo.GrpoConfig(), LIMIT)
    m = len(batch["tokens"])
    assert n <= m == -(-len(items) // SHAPE.rows) and batch["tokens"].shape == (m, SHAPE.rows, SHAPE.row_tokens)
    few, _ = minibatches.pack(items, dataclasses.replace(SHAPE, row_tokens=4 * LIMIT), grpo.GrpoConfig(), LIMIT)
    assert len(few["tokens"]) == m  # whatever the lengths: one program for all minibatches
    found = 0
    for at in np.ndindex(*batch["segments"].shape[:2]):
        segments, learned = batch["segments"][at], batch["is_completion"][at]
        for segment in np.unique(segments[learned]):
            here = learned & (segments == segment)
            c = items[int(batch["advantage"][at][here][0])].sample.completion
            np.testing.assert_array_equal(batch["targets"][at][here], c.tokens)
            np.testing.assert_array_equal(batch["sampler_logp"][at][here], c.logp)
            np.testing.assert_array_equal(batch["replay"][at][here], c.experts[len(PROMPTS[c.prompt]) - 1 :])
            assert len(np.unique(batch["advantage"][at][here])) == 1
            found += 1
    assert found == len(items)
    assert (batch["replay"][:n][batch["segments"][:n] == 0] == -1).all()


def test_equal_prompts_of_different_examples_may_share_a_reading() -> None:
    items = [Trained(s, 0.0, True) for group in groups() for s in group]
    twins = [dataclasses.replace(i, sample=dataclasses.replace(i.sample, prompt_tokens=PROMPTS[0])) for i in items]
    wide = dataclasses.replace(SHAPE, row_tokens=200, rows=1, replay=False)
    batch, _ = minibatches.pack(twins, wide, grpo.GrpoConfig(), LIMIT)
    assert ((batch["segments"] > 0) & ~batch["is_completion"]).sum() == len(PROMPTS[0]) - 1
