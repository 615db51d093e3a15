"""Laws of the jitted steps: packing, sharing, splitting and replaying change how it is computed, never what."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import DEEPSEEK, QWEN, jit, made_sample, one_device, random_completion, random_params

from r1jax import grpo, minibatches, updates
from r1jax.minibatches import Trained
from r1jax.model import transformer
from r1jax.packing import pack_documents
from r1jax.types import Params

COMPOSED = {"rtol": 1e-4, "atol": 1e-4}
LIMIT, CAPACITY = 12, 8  # every minibatch here is padded to 8 microbatches: one program
SEQUENCES = 33  # more than any segment of a row of 32
SHARED = minibatches.Shape(row_tokens=32, rows=2, share_prompt=True, replay=False)
REPEATED = dataclasses.replace(SHARED, share_prompt=False)
# Plain descent with rate one: the parameters move by the gradient itself.
DESCENT = optax.sgd(1.0)


def items_of(config, prompts=((5, 6, 7, 8, 9), (3, 4)), group=6) -> list[Trained]:
    """Completions of different lengths with random advantages."""
    rng = np.random.default_rng(0)
    completions = [
        random_completion(config, rng, i, member, len(ids), int(rng.integers(1, LIMIT + 1)))
        for i, ids in enumerate(prompts)
        for member in range(group)
    ]
    return [Trained(made_sample(prompts[c.prompt], c), float(rng.normal()), True) for c in completions]


def widened(batch: dict, n: int) -> tuple[dict, int]:
    """The same minibatch with empty microbatches up to CAPACITY."""
    assert n <= len(batch["tokens"]) <= CAPACITY
    return {
        name: np.concatenate([a, np.zeros((CAPACITY - len(a), *a.shape[1:]), a.dtype)]) for name, a in batch.items()
    }, n


def packed(items: Sequence[Trained], shape=SHARED, settings=grpo.GrpoConfig()) -> tuple[dict, int]:  # noqa: B008
    return widened(*minibatches.pack(items, shape, settings, LIMIT))


def padded(items: Sequence[Trained]) -> tuple[dict, int]:
    """One completion a row, with its own prompt; the weights are those of the whole."""
    parts = [minibatches.pack([item], REPEATED, grpo.GrpoConfig(), LIMIT)[0] for item in items]
    rows = {name: np.concatenate([part[name][0, :1] for part in parts]) for name in parts[0]}
    rows["weights"] = rows["weights"] / len(items)
    return widened({name: a.reshape(-1, 2, *a.shape[1:]) for name, a in rows.items()}, len(items) // 2)


def with_logps(batch: dict) -> dict:
    """Old and reference log-probabilities that depend on the token alone, so that they are the same however it lies."""
    seed = batch["sampler_logp"]
    return {**batch, "old_logp": -3 + 0.2 * np.sin(9 * seed), "ref_logp": -3 + 0.5 * np.cos(7 * seed)}


def descended(update: Callable, params: Params, batch: dict, n: int) -> tuple[Params, dict]:
    """The gradient of one step, and its record."""
    state, record = update(updates.init_state(params, DESCENT), batch, n)
    return jax.tree.map(lambda old, new: old - np.asarray(new), params, state["policy"]), record


def expect_equal(got: tuple[Params, dict], want: tuple[Params, dict]) -> None:
    assert max(np.abs(g).max() for g in jax.tree.leaves(want[0])) > 1e-2
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, **COMPOSED), got[0], want[0])
    assert got[1].keys() == want[1].keys()
    for name in set(got[1]) - {"load"}:
        np.testing.assert_allclose(got[1][name], want[1][name], err_msg=name, **COMPOSED)


# --- RL: a dense policy, off-policy, with a reference --------------------------------------------------------------


@pytest.fixture(scope="module")
def dense() -> tuple[Callable, Params]:
    program = updates.Program(QWEN, one_device()["train"], temperature=0.8)
    settings = grpo.GrpoConfig(kl_coef=0.1, ratio_level="sequence_mean")
    return jit(updates.make_rl_update(program, settings, DESCENT, SEQUENCES)), random_params(QWEN)


@pytest.fixture(scope="module")
def whole(dense: tuple[Callable, Params]) -> tuple[Params, dict]:
    """Gradient and record of the packed minibatch that shares prompts."""
    batch, n = packed(items_of(QWEN))
    return descended(*dense, with_logps(batch), n)


def test_packed_with_a_shared_prompt_is_one_completion_a_row(dense, whole) -> None:
    items = items_of(QWEN)
    batch, n = padded(items)
    assert n == 6 > packed(items)[1]
    assert sum(len(i.sample.completion.tokens) for i in items) == batch["is_completion"].sum() == whole[1]["tokens"]
    expect_equal(descended(*dense, with_logps(batch), n), whole)


def test_a_shared_prompt_is_a_repeated_prompt(dense, whole) -> None:
    batch, n = packed(items_of(QWEN), REPEATED)
    assert (batch["segments"] > 0).sum() > (packed(items_of(QWEN))[0]["segments"] > 0).sum()
    expect_equal(descended(*dense, with_logps(batch), n), whole)


def test_accumulated_is_whole(dense, whole) -> None:
    batch, n = packed(items_of(QWEN))
    rows = {name: a[:n].reshape(-1, *a.shape[2:]) for name, a in batch.items()}
    used = np.flatnonzero((rows["segments"] > 0).any(1))
    # One row to a microbatch, in the other order, the second row of each empty.
    apart = {name: np.stack([a[used[::-1]], np.zeros_like(a[used])], axis=1) for name, a in rows.items()}
    assert len(used) > n
    expect_equal(descended(*dense, with_logps(widened(apart, len(used))[0]), len(used)), whole)


def test_only_the_first_n_microbatches_count(dense, whole) -> None:
    batch, n = packed(items_of(QWEN))
    filled = {name: np.concatenate([a[:n], np.repeat(a[:1], CAPACITY - n, axis=0)]) for name, a in batch.items()}
    expect_equal(descended(*dense, with_logps(filled), n), whole)
    assert descended(*dense, with_logps(filled), n + 1)[1]["tokens"] > whole[1]["tokens"]


def test_a_step_that_is_not_finite_changes_no_parameter(dense) -> None:
    update, params = dense
    batch, n = packed(items_of(QWEN))
    batch = with_logps(batch)
    batch["advantage"] = np.where(batch["is_completion"], np.nan, batch["advantage"])
    state, record = update(updates.init_state(params, DESCENT), batch, n)
    assert record["optim/skipped"] == 1 and state["optim"].skipped == state["optim"].skipped_in_a_row == 1
    jax.tree.map(np.testing.assert_array_equal, state["policy"], params)


def test_nan_outside_completions_does_not_matter(dense, whole) -> None:
    batch, n = packed(items_of(QWEN))
    batch = with_logps(batch)
    for name in ("old_logp", "ref_logp", "sampler_logp", "advantage"):
        batch[name] = np.where(batch["is_completion"], batch[name], np.nan)
    expect_equal(descended(*dense, batch, n), whole)


# --- RL: a mixture, on-policy, with replay -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A program for a mixture, its weights, a minibatch, and the experts that its router chooses there."""

    update: Callable
    score: Callable
    params: Params
    batch: dict
    n: int
    rate: float = 0.01


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    program = updates.Program(DEEPSEEK, one_device()["train"], router_bias_rate=Mixture.rate)
    update = updates.make_rl_update(program, grpo.GrpoConfig(kl_coef=0), DESCENT, SEQUENCES)
    shape = dataclasses.replace(SHARED, replay=True)
    batch, n = packed(items_of(DEEPSEEK), shape)
    return Mixture(jit(update), jit(updates.make_score(program)), random_params(DEEPSEEK), batch, n)


def chosen(m: Mixture) -> np.ndarray:
    """The router's own choice [M, B, T, L, K] for the minibatch."""

    @jit
    def experts(params, batch):
        flat = [batch[name].reshape(-1, 32) for name in ("tokens", "positions", "segments", "parents")]
        return transformer.hidden(params, DEEPSEEK, *flat, keep=("experts",)).experts

    out = np.transpose(np.asarray(experts(m.params, m.batch)), (1, 2, 0, 3))
    return out.reshape(CAPACITY, 2, *out.shape[1:])


def test_the_first_ratio_is_exactly_one_and_biases_move_against_load(mixture: Mixture) -> None:
    gradient, record = descended(mixture.update, mixture.params, mixture.batch, mixture.n)
    metrics = grpo.finish_metrics(record)
    assert metrics["ratio/max"] == metrics["ratio/mean"] == 1.0
    assert record["clip_low"] == record["clip_high"] == 0
    load = np.asarray(record["load"])
    live = (mixture.batch["segments"][: mixture.n] > 0).sum()
    np.testing.assert_array_equal(load.sum(1), [live * DEEPSEEK.num_experts_per_tok] * 2)
    given = mixture.batch["replay"][mixture.batch["segments"] > 0]  # [tokens, L, K]
    np.testing.assert_array_equal(load, [np.bincount(given[:, i].ravel(), minlength=8) for i in range(2)])
    moved = -gradient["moe"]["mlp"]["router_bias"]
    np.testing.assert_allclose(moved, mixture.rate * np.sign(load.mean(1, keepdims=True) - load), atol=1e-6)
    assert (np.sign(moved) != 0).any()


def test_replaying_the_routers_own_choice_changes_nothing(mixture: Mixture) -> None:
    own = {**mixture.batch, "replay": np.full_like(mixture.batch["replay"], -1)}
    replayed = {**mixture.batch, "replay": chosen(mixture).astype(np.int16)}
    want = descended(mixture.update, mixture.params, own, mixture.n)
    expect_equal(descended(mixture.update, mixture.params, replayed, mixture.n), want)
    np.testing.assert_array_equal(mixture.score(mixture.params, replayed, mixture.n)[mixture.n :], 0)
    # Another choice is another policy.
    scores = [np.asarray(mixture.score(mixture.params, batch, mixture.n)) for batch in (own, replayed, mixture.batch)]
    counted = mixture.batch["is_completion"]
    np.testing.assert_allclose(scores[1][counted], scores[0][counted], **COMPOSED)
    assert np.abs(scores[2] - scores[0])[counted].max() > 0.1


# --- next-token steps ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taught() -> tuple[Callable, Params]:
    config = dataclasses.replace(DEEPSEEK, num_nextn_predict_layers=1)
    program = updates.Program(config, one_device()["train"], mtp_weight=0.3)
    return jit(updates.make_sft_update(program, DESCENT)), random_params(config)


def test_documents_in_one_row_are_documents_in_rows_of_their_own(taught) -> None:
    lengths = np.array([9, 2, 14, 6, 3, 20])
    rng = np.random.default_rng(0)
    tokens, is_learned = rng.integers(0, 40, lengths.sum()), rng.random(lengths.sum()) < 0.7

    def batch(rows: Sequence) -> tuple[dict, int]:
        out = {name: np.concatenate([getattr(r, name) for r in rows]) for name in rows[0]._fields}
        out = {name: np.pad(a, ((0, len(a) % 2), (0, 0))) for name, a in out.items()}
        return widened({name: a.reshape(-1, 2, 32) for name, a in out.items()}, len(out["tokens"]) // 2)

    starts = np.cumsum(lengths) - lengths
    together = batch([pack_documents(tokens, lengths, 32, is_learned)])
    apart = batch(
        [
            pack_documents(tokens[s : s + k], np.array([k]), 32, is_learned[s : s + k])
            for s, k in zip(starts, lengths, strict=True)
        ]
    )
    assert together[1] < apart[1] == 3
    got, want = descended(*taught, *together), descended(*taught, *apart)
    expect_equal(got, want)
    np.testing.assert_array_equal(got[1]["load"], want[1]["load"])
    np.testing.assert_array_equal(got[1]["mtp_load"], want[1]["mtp_load"])
    # The first token of a document is no target, and of multi-token prediction the second is none either.
    learned = [is_learned[s : s + k] for s, k in zip(starts, lengths, strict=True)]
    assert got[1]["tokens"] == sum(d[1:].sum() for d in learned)
    assert got[1]["mtp_tokens"] == sum(d[2:].sum() for d in learned)
    loss = got[1]["nll"] / got[1]["tokens"] + 0.3 * got[1]["mtp_nll"] / got[1]["tokens"]
    assert got[1]["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_cast_leaves_the_router_alone() -> None:
    cast = jax.eval_shape(lambda params: updates.cast(params, "bfloat16"), transformer.shapes(DEEPSEEK))
    dtypes = jax.tree.map(lambda a: a.dtype, cast)
    router = {dtypes["moe"]["mlp"].pop(name) for name in ("router", "router_bias")}
    assert router == {jnp.dtype("float32")} and set(jax.tree.leaves(dtypes)) == {jnp.dtype("bfloat16")}
