"""The architecture as one frozen record, in the released configurations' spellings.

Covers DeepSeek-V2/V3/R1 (arXiv 2412.19437, section 2), Qwen 2/2.5/3 (dense and MoE) and Llama 3.
"""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding and its length extension (YaRN: arXiv 2309.00071; Llama 3: its released code)."""

    theta: float = 10_000.0
    kind: Literal["default", "yarn", "llama3", "linear"] = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    truncate: bool = True


ATTENTION_PATHS = ("auto", "whole", "blocks", "kernel")
EXPERT_EXCHANGES = ("gather", "all_to_all", "ragged_all_to_all")


@dataclasses.dataclass(frozen=True)
class Paths:
    """How a model is computed, which changes nothing of what: a choice for the run and its devices."""

    # Over rows: scores of whole rows at once, in blocks, or by the TPU kernel; auto takes what row and device call for.
    attention: str = "auto"
    expert_exchange: str = "gather"  # how tokens reach experts on other devices (model/exchange.py)
    expert_slack: float = 1.5  # room for what comes from there, in multiples of the mean

    def __post_init__(self) -> None:
        for key, choices in (("attention", ATTENTION_PATHS), ("expert_exchange", EXPERT_EXCHANGES)):
            if (value := getattr(self, key)) not in choices:
                raise ValueError(f"config.model.{key} is {value!r}, wanted one of {', '.join(choices)}")
        if not self.expert_slack > 0:
            raise ValueError(f"config.model.expert_slack is {self.expert_slack}, wanted above 0")


DEFAULT_PATHS = Paths()


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes the mathematics; nothing about devices, batches or training."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    attention: Literal["mla", "gqa"] = "gqa"
    # grouped-query attention
    num_key_value_heads: int = 0
    head_dim: int = 0
    qkv_bias: bool = False
    qk_norm: bool = False
    # multi-head latent attention
    q_lora_rank: int | None = None
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    # mixture of experts; zero experts means every layer is dense
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    n_shared_experts: int = 0
    moe_intermediate_size: int = 0
    first_k_dense_replace: int = 0
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    n_group: int = 1
    topk_group: int = 1
    group_score: Literal["top2", "max"] = "top2"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    router_bias: bool = True
    # multi-token prediction (DeepSeek-V3, section 2.2)
    num_nextn_predict_layers: int = 0
    # the rest
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    max_position_embeddings: int = 4096
    rope: Rope = Rope()

    def __post_init__(self) -> None:
        if self.attention == "gqa":
            if not self.num_key_value_heads or not self.head_dim:
                raise ValueError("attention 'gqa' needs model.num_key_value_heads and model.head_dim above zero")
            if self.num_attention_heads % self.num_key_value_heads:
                raise ValueError(
                    f"model.num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                    f"model.num_key_value_heads ({self.num_key_value_heads})"
                )
        elif not (self.kv_lora_rank and self.qk_nope_head_dim and self.qk_rope_head_dim and self.v_head_dim):
            raise ValueError(
                "attention 'mla' needs kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim above zero"
            )
        if self.n_routed_experts:
            if self.n_routed_experts % self.n_group:
                raise ValueError(
                    f"model.n_routed_experts ({self.n_routed_experts}) must be a multiple of "
                    f"model.n_group ({self.n_group})"
                )
            reachable = self.topk_group * (self.n_routed_experts // self.n_group)
            if not 0 < self.num_experts_per_tok <= reachable:
                raise ValueError(
                    f"model.num_experts_per_tok ({self.num_experts_per_tok}) must lie in 1..{reachable}, "
                    "the experts of model.topk_group groups"
                )

    @property
    def n_dense(self) -> int:
        """Leading layers with a dense MLP."""
        return (
            min(self.first_k_dense_replace, self.num_hidden_layers) if self.n_routed_experts else self.num_hidden_layers
        )

    @property
    def n_moe(self) -> int:
        """Layers with routed experts."""
        return self.num_hidden_layers - self.n_dense

    @property
    def cache_width(self) -> int:
        """Cached values per token and layer: 576 for DeepSeek-V3's latent, 2 * K * head_dim without one."""
        if self.attention == "mla":
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.num_key_value_heads * self.head_dim
