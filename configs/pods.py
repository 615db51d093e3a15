"""R1-Zero of released models on pods: what a run of each changes of configs/base.py, where the report's values stand.

    python -m r1jax.main --config=configs/zero.py:deepseek_v3 --config.model.path=gs://... --workdir=DIR
    python -m r1jax.plan --model=deepseek_v3 --topology=v5p:8x8x16 --layouts=...      what it needs, without a pod

All values here are *our choice*. No run of these has been made: hardware and duration are for `plan` to estimate
(tests/bench/RESULTS.md has what it gave).
"""

from typing import Any

from ml_collections import ConfigDict

BFLOAT16 = {"model.compute_dtype": "bfloat16", "model.cache_dtype": "bfloat16", "model.remat": "full"}

# Shorter completions than the report's, for slices that hold no more.
SHORT = {**BFLOAT16, "rl.max_completion_tokens": 4096, "rl.length_schedule": (), "sampler.cache_bucket": 1024}

MIXTURE = {**SHORT, "model.expert_exchange": "all_to_all", "model.remat": "attention"}

RUNS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        **BFLOAT16,
        # The second part of the report's schedule is planned by its own: --ablation=late_length
        # --config.sampler.slots=4096 --config.model.remat=attention: caches of twice the length leave room for half of
        # the slots, rows of twice the length for less that is kept.
        "rl.length_schedule": (),
        "rl.microbatch_rows": 64,
        "model.expert_exchange": "ragged_all_to_all",  # "all_to_all" on a v5e, which does not have it
        "model.remat": "experts",
        "sampler.slots": 8192,
        "sampler.prefill_prompts": 1024,
        "sampler.cache_bucket": 4480,  # five steps of half as much end at 34,032 tokens, for 33,792
        "optim.router_bias_rate": 0.0,
    },
    "deepseek_v2_lite": {**MIXTURE, "rl.microbatch_rows": 64, "sampler.slots": 1024, "sampler.prefill_prompts": 128},
    "qwen3_30b_a3b": {**MIXTURE, "rl.microbatch_rows": 64, "sampler.slots": 2048, "sampler.prefill_prompts": 256},
    "llama3_1_8b": {**SHORT, "rl.microbatch_rows": 256, "sampler.slots": 1024, "sampler.prefill_prompts": 256},
    "llama3_1_70b": {**SHORT, "rl.microbatch_rows": 256, "sampler.slots": 1024, "sampler.prefill_prompts": 256},
    "qwen2_5_7b": {**SHORT, "rl.microbatch_rows": 16, "sampler.slots": 128, "sampler.prefill_prompts": 32},
    "qwen2_5_1_5b": {
        **SHORT,
        "lora.rank": 32,
        "lora.alpha": 64.0,
        "rl.max_completion_tokens": 1024,
        "rl.microbatch_rows": 1,
        "data.max_prompt_tokens": 256,
        "sampler.slots": 64,
        "sampler.prefill_prompts": 8,
        "sampler.cache_bucket": 512,
    },
}


def apply(config: ConfigDict, model: str) -> ConfigDict:
    """The config for this model."""
    config.update_from_flattened_dict({"model.name": model, **RUNS[model]})
    return config
