"""R1-Zero on the packaged base: python -m r1jax.main --config=configs/zero.py --workdir=DIR

GRPO from a base model with accuracy and format as the only rewards. Hardware: two CPU cores; 17 minutes, 3.1 GB
(*measured*, seed 0, busy cores, 2026-11-22). Expected on 512 held-out problems, 16 samples each: pass@1 12.9% -> 56.7%,
majority of 16 34.4% -> 84.8%, tokens 35 -> 129, reflective words 0.45 -> 3.73 (*measured*, the same run; see
tests/bench/RESULTS.md for what is missing). All values below are *our choice*.
"""

from ml_collections import ConfigDict

from configs import ablations, base


def get_config(ablation: str = "") -> ConfigDict:
    """The embedded run; `ablation` names an entry of configs/ablations.py."""
    config = base.get_config()
    config.cpu_devices = 2
    config.mesh.update({"data": -1, "fsdp": 1})
    config.model.scan_unroll = 3
    config.rl.update(
        {
            "updates": 80,
            "prompts_per_update": 8,
            "minibatches": 4,
            "max_completion_tokens": 288,
            "length_schedule": (),
            "row_tokens": 320,
            "microbatch_rows": 16,
        }
    )
    config.data.max_prompt_tokens = 32
    config.optim.update({"learning_rate": 8e-4, "schedule": "cosine", "decay_steps": 80})
    config.log.rollout_groups = 8
    return ablations.apply(config, ablation)
