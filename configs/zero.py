"""R1-Zero on the packaged base: python -m r1jax.main --config=configs/zero.py --workdir=DIR

GRPO from a base model with accuracy and format as the only rewards. Hardware: two CPU cores; 9.1 to 11.0 minutes,
2.7 GB. Expected on 512 held-out problems, 16 samples each, seeds 0, 1, 2: pass@1 17.5% -> 73.3%, 75.8%, 75.3%;
majority of 16 51.4% -> 95.1%, 95.3%, 97.3%; tokens 33 -> 125, 118, 125; reflective words 0.46 -> 5.11, 4.13, 5.57
(*measured*, 2026-11-23, --config.seed=0, 1, 2; tests/bench/RESULTS.md has the rest). All values below are *our
choice*.
"""

from ml_collections import ConfigDict

from configs import ablations, base, pods


def get_config(variant: str = "") -> ConfigDict:
    """The embedded run; `variant` names a model of configs/pods.py, an entry of configs/ablations.py or both (a+b)."""
    model, _, ablation = variant.partition("+")
    if model in pods.RUNS:
        return ablations.apply(pods.apply(base.get_config(), model), ablation)
    config = base.get_config()
    config.cpu_devices = 2
    config.mesh.update({"data": -1, "fsdp": 1})
    config.model.scan_unroll = 3
    config.rl.update({**base.EMBEDDED_RL, "updates": 76})
    config.data.max_prompt_tokens = 32
    config.optim.update({"learning_rate": 8e-4, "schedule": "cosine", "decay_steps": 76})
    config.log.rollout_groups = 8
    return ablations.apply(config, variant)
