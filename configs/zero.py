"""R1-Zero on the packaged base: python -m r1jax.main --config=configs/zero.py --workdir=DIR

GRPO from a base model with accuracy and format as the only rewards.
"""

from ml_collections import ConfigDict

from configs import ablations, base


def get_config(ablation: str = "") -> ConfigDict:
    """The embedded run; `ablation` names an entry of configs/ablations.py."""
    config = base.get_config()
    config.rl.update(
        {
            "updates": 40,
            "minibatches": 2,
            "max_completion_tokens": 192,
            "length_schedule": (),
            "row_tokens": 224,
            "microbatch_rows": 32,
        }
    )
    config.data.max_prompt_tokens = 32
    config.optim.learning_rate = 5e-4
    config.log.rollout_groups = 8
    return ablations.apply(config, ablation)
