"""Tiny configurations of every released family, random weights for them, and ways to change a saved folder."""

import dataclasses
import pathlib
from collections.abc import Callable

import ml_dtypes
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file

from r1jax.model import safetensors_io, tensors
from r1jax.model.config import ModelConfig, Rope

FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)

YARN = Rope(kind="yarn", factor=4.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=1.0)
DEEPSEEK = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=24,
    attention="mla",
    kv_lora_rank=8,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=2,
    moe_intermediate_size=4,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    rope=YARN,
    num_nextn_predict_layers=1,
)
V2 = dataclasses.replace(
    DEEPSEEK,
    n_group=1,
    topk_group=1,
    scoring_func="softmax",
    group_score="max",
    norm_topk_prob=False,
    router_bias=False,
    num_nextn_predict_layers=0,
    rope=Rope(),
)
GQA = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=24,
    num_key_value_heads=2,
    head_dim=4,
)
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
LLAMA3 = Rope(theta=5e5, kind="llama3", factor=8.0, original_max_position_embeddings=512)
CONFIGS = {
    "deepseek_v3": DEEPSEEK,
    "deepseek_v3, low-rank query": dataclasses.replace(DEEPSEEK, q_lora_rank=7),
    "deepseek_v3, tied": dataclasses.replace(DEEPSEEK, tie_word_embeddings=True),
    "deepseek_v3, no MTP": dataclasses.replace(DEEPSEEK, num_nextn_predict_layers=0, rope=Rope(theta=1e5)),
    "deepseek_v3, all dense but MTP": dataclasses.replace(DEEPSEEK, first_k_dense_replace=3),
    "deepseek_v2": V2,
    "deepseek_v2, groups": dataclasses.replace(V2, n_group=4, topk_group=2, q_lora_rank=7, rope=YARN),
    "qwen2": dataclasses.replace(GQA, qkv_bias=True, tie_word_embeddings=True),
    "qwen3": dataclasses.replace(GQA, qk_norm=True, head_dim=6),
    "qwen3_moe": dataclasses.replace(GQA, qk_norm=True, scoring_func="softmax", router_bias=False, **ROUTED),
    "llama": dataclasses.replace(GQA, rope=LLAMA3),
}


def random_tree(config: ModelConfig, dtype: np.dtype = FLOAT32, seed: int = 0) -> dict:
    """Random weights of every leaf, as numpy arrays."""
    rng, size, flat = np.random.default_rng(seed), tensors.sizes(config), {}
    for entry in tensors.entries(config):
        for _, at, shape in tensors.leaves(entry, size) if not entry.copy else ():
            kept = np.float32 if at.endswith(("router", "router_bias")) else dtype
            flat[at] = rng.standard_normal(shape, np.float32).astype(kept)
    return unflatten_dict(flat, sep=".")


def read(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Every stored tensor."""
    return {name: tensor.read() for name, tensor in safetensors_io.open_folder(folder).items()}


def edit(folder: pathlib.Path, change: Callable[[dict], object]) -> None:
    """Rewrites the single file of a folder with changed tensors."""
    held = read(folder)
    change(held)
    save_file({name: np.ascontiguousarray(t) for name, t in held.items()}, folder / "model.safetensors")
