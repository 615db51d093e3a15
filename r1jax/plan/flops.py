"""Operations that the mathematics of a model asks for, recomputation and padding left out: what MFU divides by.

Counted as PaLM does (arXiv 2204.02311, appendix B): two per weight and token, and attention's two products.
"""

import jax
import numpy as np

from r1jax.model import transformer
from r1jax.model.config import ModelConfig

BACKWARD = 3  # a training step is a forward pass and a backward one of twice its operations


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


def forward(config: ModelConfig, tokens: float, keys: float) -> float:
    """A pass over `tokens` tokens that read `keys` others each, on average."""
    return tokens * (2 * active_weights(config) + keys * attention_per_pair(config))


def decode(config: ModelConfig, tokens: float, keys: float) -> float:
    """The same, one token at a time over a cache."""
    return tokens * (2 * active_weights(config) + keys * attention_per_pair(config, absorbed=True))
