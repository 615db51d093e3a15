"""Tiny policies with sharp random weights, groups made by hand, and a jit that compiles quickly."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from r1jax import sharding
from r1jax.model import transformer
from r1jax.model.config import ModelConfig, Rope
from r1jax.rewards.pool import Graded
from r1jax.rollout import Sample
from r1jax.types import Completion, Params

# Compiling is most of the time there is, and optimizing most of that.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

DEEPSEEK = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=24,
    attention="mla",
    kv_lora_rank=8,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    moe_intermediate_size=4,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    rope=Rope(kind="yarn", factor=4.0, original_max_position_embeddings=16, mscale_all_dim=1.0),
)
QWEN = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=24,
    num_key_value_heads=2,
    head_dim=6,
    qkv_bias=True,
    qk_norm=True,
    tie_word_embeddings=True,
)
QWEN_MOE = dataclasses.replace(
    QWEN,
    qkv_bias=False,
    tie_word_embeddings=False,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=6,
    scoring_func="softmax",
    router_bias=False,
)


def random_params(config: ModelConfig, seed: int = 0) -> Params:
    """Weights so large that attention and routing are sharp, no norm or bias at a value that would hide an error."""
    rng = np.random.default_rng(seed)

    def one(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if name.endswith("norm"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return rng.normal(0, 0.3, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, transformer.shapes(config))


def one_device() -> dict[str, sharding.Layout]:
    """The layouts of a mesh of a single device."""
    return sharding.layouts(sharding.make_mesh({}, jax.devices()[:1]))


def random_completion(
    config: ModelConfig, rng: np.random.Generator, prompt: int, member: int, n_prompt: int, n: int
) -> Completion:
    """A completion of n random tokens, with random log-probabilities and, for a mixture, experts."""
    experts = None
    if config.n_moe:
        shape = n_prompt + n - 1, config.n_moe
        each = [rng.permutation(config.n_routed_experts)[: config.num_experts_per_tok] for _ in range(np.prod(shape))]
        experts = np.reshape(each, (*shape, -1)).astype(np.int16)
    tokens = rng.integers(1, config.vocab_size, n).astype(np.int32)
    return Completion(prompt, member, tokens, rng.normal(-3, 1, n).astype(np.float32), "stop", experts)


def made_sample(
    prompt_tokens: Sequence[int],
    completion: Completion,
    reward: float = 0.0,
    answer: str | None = None,
    text: str = "",
    **example: Any,
) -> Sample:
    """A graded sample; the reward "accuracy" is the reward."""
    graded = Graded(0, {"accuracy": reward}, reward, answer, (), 0.0)
    return Sample({"id": "0", **example}, "", tuple(prompt_tokens), completion, text, graded)
