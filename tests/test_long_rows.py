"""Laws of long rows: attention in blocks is attention, over split rows too, and holds no table of all scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import DEEPSEEK, QWEN, jit, random_params

from r1jax import sharding
from r1jax.model import blockwise, layers, transformer
from r1jax.model.blockwise import Reading
from r1jax.model.config import ModelConfig, Paths

COMPOSED = {"rtol": 1e-4, "atol": 1e-4}


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def packed(b: int, t: int, seed: int = 3) -> tuple[jax.Array, jax.Array]:
    """Segments of rows, the last token padding, and parents: segment 3 reads segment 1 besides itself."""
    segments = np.sort(np.random.default_rng(seed).integers(1, 5, (b, t)), axis=1)
    segments[:, -1] = 0
    return jnp.asarray(segments), jnp.where(segments == 3, 1, segments)


@pytest.mark.parametrize(("t", "block"), [(61, 16), (64, 16), (20, 512)])
def test_attention_in_blocks_and_its_gradient_are_attention(t: int, block: int) -> None:
    q, k, v, out = normal(0, 2, t, 2, 3, 4), normal(1, 2, t, 2, 4), normal(2, 2, t, 2, 5), normal(4, 2, t, 2, 3, 5)
    segments, parents = packed(2, t)

    @jit
    def both(*qkv: jax.Array) -> list:
        mask = layers.attention_mask(segments, parents, "whole").whole
        reading = Reading(segments, parents, segments, jnp.int32(0))
        paths = [lambda *a: layers.attend(*a, mask, 0.5), lambda *a: blockwise.attend(*a, reading, 0.5, block)]
        pairs = [jax.vjp(path, *qkv) for path in paths]
        return [(y, pull(jnp.asarray(out))) for y, pull in pairs]

    want, got = both(q, k, v)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, **COMPOSED), got, want)


@pytest.mark.parametrize("path", ["blocks", "kernel"])
@pytest.mark.parametrize("config", [DEEPSEEK, QWEN], ids=["mla", "gqa"])
def test_rows_split_over_devices_are_whole_rows(config: ModelConfig, path: str) -> None:
    params, t = random_params(config), 24
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, config.vocab_size, (2, t)))
    segments, parents = packed(2, t)
    layout = sharding.layouts(sharding.make_mesh({"context": 4, "tensor": 2}))["train"]

    def loss(params: dict, layout: sharding.Layout | None, paths: Paths) -> jax.Array:
        with sharding.use(layout):
            x = transformer.hidden(params, config, tokens, segments=segments, parents=parents, paths=paths).x
            return (transformer.token_logps(params, x, tokens)[0] * (segments > 0)).sum()

    run = jit(jax.value_and_grad(loss), static_argnums=(1, 2))
    want, got = run(params, None, Paths(attention="whole")), run(params, layout, Paths(attention=path))
    assert abs(want[0]) > 1
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, **COMPOSED), got, want)


def test_rows_of_65536_tokens_take_memory_by_the_token() -> None:
    def temporary(t: int) -> int:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
            return blockwise.attend(q, k, v, Reading(ids, ids, ids, jnp.int32(0)), 1.0).sum()

        shapes = (1, t, 1, 1, 8), (1, t, 1, 8), (1, t, 1, 8)
        given = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes] + [jax.ShapeDtypeStruct((1, t), jnp.int32)]
        compiled = jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*given).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(65_536) < 2.2 * temporary(32_768) < 65_536 * 32_768 / 8


def test_an_unknown_path_is_named() -> None:
    with pytest.raises(ValueError, match="config.model.attention is 'ring', wanted one of auto, whole, blocks, kernel"):
        Paths(attention="ring")
    with pytest.raises(
        ValueError, match="config.model.expert_exchange is 'ring', wanted one of gather, all_to_all, ragged"
    ):
        Paths(expert_exchange="ring")
    with pytest.raises(ValueError, match="config.model.expert_slack is 0, wanted above 0"):
        Paths(expert_slack=0)
