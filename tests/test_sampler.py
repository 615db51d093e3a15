"""Laws of the sampler: how slots, batches and caches are sized decides the cost, never a token."""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import DEEPSEEK, QWEN, jit, made_sample, one_device, random_params

from r1jax import grpo, minibatches, sharding, updates
from r1jax.draw import DrawConfig, draw, sample_keys, uniforms
from r1jax.model import transformer
from r1jax.model.config import ModelConfig
from r1jax.rollout import stop_text_finder
from r1jax.sampler import Interrupted, _Loop, buckets, sample
from r1jax.slots import SamplerConfig, Verbs
from r1jax.types import Completion, Params, Request

KEY = jax.random.key(3)
STOP, LIMIT, GROUP = 7, 30, 4
DRAWING = DrawConfig(temperature=0.9)
PROMPTS = [tuple(np.random.default_rng(i).integers(8, 40, n).tolist()) for i, n in enumerate((3, 14, 1, 7, 9))]
REQUESTS = [Request(i, member, ids) for i, ids in enumerate(PROMPTS) for member in range(GROUP)]


def verbs(config: ModelConfig, sizes: SamplerConfig, drawing: DrawConfig = DRAWING) -> Verbs:
    """The device side, compiled quickly; `resized` lists the sizes that `resize` was called for."""
    made = Verbs(config, sizes, drawing, one_device()["decode"], [STOP])
    made.prefill, made.insert, made.generate = jit(made.prefill), jit(made.insert), jit(made.generate)
    resize, made.resized = jit(made.resize, static_argnums=2), []

    def noted(slots, keep, length):
        made.resized.append((len(slots.token) if keep is None else keep.size, length))
        return resize(slots, keep, length)

    made.resize = noted
    return made


def run(made: Verbs, params: Params, requests=REQUESTS, limit=LIMIT, **given) -> dict[tuple[int, int], Completion]:
    out = {}
    for c in sample(made, params, requests, KEY, limit, **given, with_experts=True):
        assert (c.prompt, c.member) not in out
        out[c.prompt, c.member] = c
    assert set(out) == {(r.prompt, r.member) for r in requests}
    return out


@pytest.fixture(scope="module")
def params() -> Params:
    return random_params(DEEPSEEK)


@pytest.fixture(scope="module")
def few(params: Params) -> tuple[Verbs, dict]:
    """Three slots for twenty requests, prompts read two at a time, a cache that has to grow."""
    made = verbs(DEEPSEEK, SamplerConfig(slots=3, tokens_per_dispatch=5, cache_bucket=16, prefill_prompts=2))
    return made, run(made, params)


def expect_by_forward(config: ModelConfig, params: Params, found: dict[tuple[int, int], Completion]) -> None:
    """Tokens, log-probabilities and experts are what the full forward and the draws' names say."""
    names = list(found)
    tokens = np.zeros((len(names), 64), np.int32)
    for row, (prompt, member) in enumerate(names):
        ids = [*PROMPTS[prompt], *found[prompt, member].tokens]
        tokens[row, : len(ids)] = ids
    starts = np.array([len(PROMPTS[prompt]) - 1 for prompt, _ in names])

    @jit
    def replay(params, tokens):
        out = transformer.hidden(params, config, tokens, keep=("experts",))
        where = starts[:, None] + np.arange(LIMIT)
        z = transformer.logits(params, out.x)[np.arange(len(names))[:, None], where]
        keys = sample_keys(KEY, *jnp.array(names).T)
        u = jax.vmap(lambda place: uniforms(keys, jnp.full(len(names), place)), out_axes=1)(jnp.arange(LIMIT))
        drawn, logp = jax.vmap(lambda z, u: draw(z, u, DRAWING), in_axes=1, out_axes=1)(z, u)
        return drawn, logp, out.experts

    drawn, logp, experts = jax.device_get(replay(params, tokens))
    for row, name in enumerate(names):
        c, n = found[name], len(found[name].tokens)
        np.testing.assert_array_equal(c.tokens, drawn[row, :n])
        np.testing.assert_allclose(c.logp, logp[row, :n], rtol=1e-4, atol=1e-4)
        if config.n_moe:
            read = len(PROMPTS[name[0]]) + n - 1
            np.testing.assert_array_equal(c.experts, np.swapaxes(experts[:, row, :read], 0, 1))
        else:
            assert c.experts is None
        assert 1 <= n <= LIMIT and STOP not in c.tokens[:-1]
        assert c.stop == ("stop" if c.tokens[-1] == STOP else "length") and (c.stop == "stop" or n == LIMIT)
    assert {c.stop for c in found.values()} == {"stop", "length"}


def test_completions_are_what_the_full_forward_says(few: tuple[Verbs, dict], params: Params) -> None:
    made, found = few
    assert len({length for _, length in made.resized}) > 1  # the cache grew
    expect_by_forward(DEEPSEEK, params, found)


def test_completions_are_what_the_full_forward_says_of_a_dense_gqa_policy() -> None:
    params = random_params(QWEN)
    made = verbs(QWEN, SamplerConfig(slots=4, tokens_per_dispatch=8, cache_bucket=64, prefill_prompts=4))
    expect_by_forward(QWEN, params, run(made, params))


def same(got: Completion, want: Completion, n: int | None = None) -> None:
    """`got` is the first n tokens of `want`."""
    n = len(want.tokens) if n is None else n
    np.testing.assert_array_equal(got.tokens, want.tokens[:n])
    np.testing.assert_allclose(got.logp, want.logp[:n], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(got.experts, want.experts[: len(PROMPTS[got.prompt]) + n - 1])


@pytest.mark.parametrize(
    "sizes",
    [
        SamplerConfig(slots=64, tokens_per_dispatch=16, cache_bucket=64, prefill_prompts=8),
        SamplerConfig(slots=7, tokens_per_dispatch=1, cache_bucket=64, prefill_prompts=1, refill_share=1.0),
    ],
    ids=["more slots than requests", "a token at a time"],
)
def test_sizes_change_no_token(sizes: SamplerConfig, few: tuple[Verbs, dict], params: Params) -> None:
    made = verbs(DEEPSEEK, sizes)
    found = run(made, params, REQUESTS[::-1])
    if sizes.slots == 64:
        assert {n for n, _ in made.resized} == {16}  # the batch was compacted
    for name, completion in found.items():
        same(completion, few[1][name])
        assert completion.stop == few[1][name].stop


def test_each_request_ends_at_its_own_limit(few: tuple[Verbs, dict], params: Params) -> None:
    made, base = few
    limits = [1, 2, 9, 0, 100, 5]
    requests = [dataclasses.replace(r, max_tokens=n) for r, n in zip(REQUESTS, limits, strict=False)]
    found = run(made, params, requests, limit=20)
    for r in requests:
        want, allowed = base[r.prompt, r.member], min(r.max_tokens or 20, 20)
        same(found[r.prompt, r.member], want, min(allowed, len(want.tokens)))
        ended = want.stop == "stop" and len(want.tokens) <= allowed
        assert found[r.prompt, r.member].stop == ("stop" if ended else "length")


def test_prompts_padded_alike_share_their_program_and_give_the_same_tokens(
    few: tuple[Verbs, dict], params: Params
) -> None:
    made, base = few
    before = made.prefill._cache_size()
    short = [r for r in REQUESTS if len(r.tokens) < 8]
    for requests, length in ((REQUESTS, 17), (short, 32), (short, 20)):
        for name, completion in run(made, params, requests, prompt_tokens=length).items():
            same(completion, base[name])
    assert made.prefill._cache_size() == before + 1


class Letters:
    """A tokenizer whose tokens are single letters and digits."""

    def decode(self, ids: list[int]) -> str:
        return "".join("abcdefghijklmnopqrstuvwxyz0123456789ABCD"[i] for i in ids)


def test_a_stop_text_ends_a_completion_with_the_token_that_completes_it(
    few: tuple[Verbs, dict], params: Params
) -> None:
    made, base = few
    letters = Letters()
    texts = {name: letters.decode(c.tokens) for name, c in base.items()}
    stop_texts = [max(texts.values(), key=len)[i : i + 2] for i in (3, 10)]
    found = run(made, params, is_stopped=stop_text_finder(letters, stop_texts))
    cut = {name: min((text.find(s) + 2 for s in stop_texts if s in text), default=0) for name, text in texts.items()}
    assert any(cut.values()) and not all(cut.values())
    for name, n in cut.items():
        same(found[name], base[name], n or None)
        assert found[name].stop == ("stop" if n else base[name].stop)


def test_scores_of_packed_completions_are_the_samplers_log_probabilities(
    few: tuple[Verbs, dict], params: Params
) -> None:
    items = [minibatches.Trained(made_sample(PROMPTS[c.prompt], c), 0.0, True) for c in few[1].values()]
    shape = minibatches.Shape(row_tokens=64, rows=4, share_prompt=True, replay=True)
    batch, n = minibatches.pack(items, shape, grpo.GrpoConfig(), LIMIT)
    program = updates.Program(DEEPSEEK, one_device()["train"], temperature=DRAWING.temperature)
    scores = np.asarray(jit(updates.make_score(program))(params, batch, n))
    is_completion = batch["is_completion"]
    assert is_completion.sum() == sum(len(i.sample.completion.tokens) for i in items)
    np.testing.assert_allclose(scores[is_completion], batch["sampler_logp"][is_completion], rtol=1e-4, atol=1e-4)


def test_a_stop_text_is_found_where_it_is_first_complete() -> None:
    find: Callable = stop_text_finder(Letters(), ["bcd", "dd"])
    assert find([0, 1, 2]) is None and find([0, 1, 2, 3, 4]) == 4 and find([3, 0, 3, 3, 1, 2, 3]) == 4
    assert stop_text_finder(Letters(), [])([0, 1, 2]) is None


def test_cache_lengths_grow_by_half_up_to_what_is_needed() -> None:
    assert buckets(64, 300) == [64, 96, 144, 224, 336]
    assert buckets(64, 50) == [64]
    for smallest, longest in ((1, 100), (16, 17), (48, 1000)):
        sizes = buckets(smallest, longest)
        assert sizes[-1] >= longest and all(a < b for a, b in itertools.pairwise(sizes))


@pytest.mark.parametrize("key", ["slots", "prefill_prompts"])
def test_sizes_that_do_not_fit_the_mesh_name_the_key(key: str) -> None:
    layout = sharding.layouts(sharding.make_mesh({"data": 2, "expert": -1}))["decode"]
    sizes = dataclasses.replace(SamplerConfig(slots=16, prefill_prompts=8), **{key: 12})
    with pytest.raises(ValueError, match=rf"config.sampler.{key} \(12\) must be a multiple of the 8 devices"):
        Verbs(DEEPSEEK, sizes, DRAWING, layout, [STOP])
    with pytest.raises(ValueError, match=f"config.sampler.{key} is 0"):
        dataclasses.replace(sizes, **{key: 0})


def test_of_a_dispatch_only_what_live_slots_drew_stays_in_memory(few: tuple[Verbs, dict], params: Params) -> None:
    loop = _Loop(few[0], params, REQUESTS, KEY, LIMIT, lambda tokens: None, 0, lambda: False, with_experts=True)
    each, most = DEEPSEEK.n_moe * DEEPSEEK.num_experts_per_tok * 2, 0
    for _ in loop.run():
        kept = [part for parts in loop.experts for part in parts] + [read for _, _, read in loop.prefixes.values()]
        assert all(part.base is None and part.flags.c_contiguous for part in kept)
        held = [i for i, one in enumerate(loop.held) if one is not None]
        drawn = sum(loop.prompt_tokens[i] + len(loop.tokens[i]) - 1 for i in held)
        assert sum(part.nbytes for parts in loop.experts for part in parts) <= each * drawn
        most = max(most, drawn)
    assert most > LIMIT


def test_experts_are_fetched_only_where_somebody_asks_for_them(few: tuple[Verbs, dict], params: Params) -> None:
    for found in sample(few[0], params, REQUESTS[:4], KEY, LIMIT):
        want = few[1][found.prompt, found.member]
        assert found.experts is None and want.experts is not None
        np.testing.assert_array_equal(found.tokens, want.tokens)


@pytest.mark.parametrize("dispatches", [0, 1, 4])
def test_asked_before_each_dispatch_it_ends_before_any_completion_has(dispatches: int, params: Params) -> None:
    made = verbs(DEEPSEEK, SamplerConfig(slots=4, tokens_per_dispatch=1, cache_bucket=64, prefill_prompts=4))
    ran, generate = [], made.generate

    def counted(*given: object) -> tuple:
        ran.append(None)
        return generate(*given)

    made.generate = counted
    found = sample(made, params, REQUESTS[:4], KEY, LIMIT, is_interrupted=lambda: len(ran) == dispatches)
    with pytest.raises(Interrupted):
        next(found)
    assert len(ran) == dispatches
