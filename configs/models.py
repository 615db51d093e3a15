"""Architectures by name: keyword arguments of r1jax.model.config.ModelConfig (and of Rope, under "rope")."""

# The embedded base. Our choice: DeepSeek-V3's kind at a size that two cores can train.
TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "attention": "mla",
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "num_nextn_predict_layers": 1,
    "initializer_range": 0.05,
    "max_position_embeddings": 2048,
}

# The same for English and Chinese.
TINY_BILINGUAL = {**TINY, "vocab_size": 672}

# The embedded student: Qwen2.5's kind, dense, a third of the size.
TINY_STUDENT = {
    "vocab_size": 672,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "intermediate_size": 256,
    "qkv_bias": True,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
    "max_position_embeddings": 2048,
}

# Released configuration of DeepSeek-V3 and R1, reported.
DEEPSEEK_V3 = {
    "vocab_size": 129_280,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "intermediate_size": 18_432,
    "attention": "mla",
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 163_840,
    "rope": {
        "kind": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}

# Released configuration of DeepSeek-V2-Lite: 15.7B parameters, 2.4B active, reported.
DEEPSEEK_V2_LITE = {
    "vocab_size": 102_400,
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "intermediate_size": 10_944,
    "attention": "mla",
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1,
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "router_bias": False,
    "max_position_embeddings": 163_840,
    "rope": {
        "kind": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
}

# Released configurations of Qwen2.5 (base) and Qwen3, reported.
QWEN2_5_1_5B = {
    "vocab_size": 151_936,
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "intermediate_size": 8960,
    "qkv_bias": True,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131_072,
    "rope": {"theta": 1_000_000.0},
}
QWEN2_5_7B = {
    **QWEN2_5_1_5B,
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18_944,
    "tie_word_embeddings": False,
}
QWEN3_30B_A3B = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "qk_norm": True,
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "scoring_func": "softmax",
    "router_bias": False,
    "max_position_embeddings": 40_960,
    "rope": {"theta": 1_000_000.0},
}
LLAMA3_1_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 14_336,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131_072,
    "rope": {
        "theta": 500_000.0,
        "kind": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
    },
}
LLAMA3_1_70B = {
    **LLAMA3_1_8B,
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "intermediate_size": 28_672,
}

MODELS = {
    "tiny": TINY,
    "tiny_bilingual": TINY_BILINGUAL,
    "tiny_student": TINY_STUDENT,
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v2_lite": DEEPSEEK_V2_LITE,
    "qwen2_5_1_5b": QWEN2_5_1_5B,
    "qwen2_5_7b": QWEN2_5_7B,
    "qwen3_30b_a3b": QWEN3_30B_A3B,
    "llama3_1_8b": LLAMA3_1_8B,
    "llama3_1_70b": LLAMA3_1_70B,
}
