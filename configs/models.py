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

MODELS = {"tiny": TINY, "tiny_bilingual": TINY_BILINGUAL, "deepseek_v3": DEEPSEEK_V3}
