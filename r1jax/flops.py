"""Operations that the mathematics of a model asks for, recomputation and padding left out.

Counted as PaLM does (arXiv 2204.02311, appendix B): two per weight and token, and attention's two products. MFU divides
by them, and training runs of different kinds are compared at equal numbers of them.
"""

import functools
from collections.abc import Iterable

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from r1jax.model import transformer
from r1jax.model.config import ModelConfig

Numbers = float | np.ndarray

BACKWARD = 3  # a training step is a forward pass and a backward one of twice its operations


@functools.cache
def active_weights(config: ModelConfig) -> float:
    """Weights that a token is multiplied with: of routed experts its share, of the embedding none but as the head."""
    shapes = transformer.shapes(config)
    shapes.pop("mtp", None)  # only pretraining and SFT run it
    total = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        is_routed = leaf.ndim == 4 and ".mlp." in name and ".shared." not in name
        share = config.num_experts_per_tok / config.n_routed_experts if is_routed else 1.0
        if name != "embed" or config.tie_word_embeddings:
            total += share * float(np.prod(leaf.shape))
    return total


def attention_per_pair(config: ModelConfig, absorbed: bool = False) -> float:
    """Operations of all layers for one query token and one key token; `absorbed` for decoding of latent attention."""
    if config.attention == "mla":
        rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
        widths = 2 * rank + rope if absorbed else config.qk_nope_head_dim + rope + config.v_head_dim
    else:
        widths = 2 * config.head_dim
    return 2.0 * config.num_hidden_layers * config.num_attention_heads * widths


def forward(config: ModelConfig, tokens: Numbers, keys: Numbers) -> Numbers:
    """A pass over `tokens` tokens that read `keys` others each, on average."""
    return tokens * (2 * active_weights(config) + keys * attention_per_pair(config))


def decode(config: ModelConfig, tokens: Numbers, keys: Numbers) -> Numbers:
    """The same, one token at a time over a cache."""
    return tokens * (2 * active_weights(config) + keys * attention_per_pair(config, absorbed=True))


def packed(
    config: ModelConfig, positions: Int[np.ndarray, "*rows T"], is_read: Bool[np.ndarray, "*rows T"]
) -> Float[np.ndarray, "*rows"]:
    """A pass over each of packed rows: `positions` is a token's place in its document, `is_read` false in padding."""
    tokens, keys = is_read.sum(-1), np.where(is_read, positions, 0).sum(-1)
    return forward(config, tokens, keys / np.maximum(tokens, 1))


def sampled(config: ModelConfig, lengths: Iterable[tuple[int, list[int]]]) -> float:
    """Completions sampled over a cache: of each prompt, read once, its length and those of its completions."""
    total = 0.0
    for prompt, completions in lengths:
        total += forward(config, prompt, prompt / 2)
        n = np.array(completions, float)
        total += decode(config, n, prompt + n / 2).sum()
    return total
