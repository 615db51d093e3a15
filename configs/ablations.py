"""Named ablations: what one line changes of a config. --config=configs/zero.py:NAME"""

import difflib
from typing import Any

from ml_collections import ConfigDict

ABLATIONS: dict[str, dict[str, Any]] = {
    "no_kl": {"grpo.kl_coef": 0.0},
    "no_std": {"grpo.normalize_std": False},
    "no_format": {"rewards.format": 0.0},
    "sequence_ratio": {"grpo.ratio_level": "sequence", "grpo.aggregation": "sequence"},
    "token_mean": {"grpo.aggregation": "token_mean"},
    "dr_grpo": {"grpo.aggregation": "constant_length", "grpo.normalize_std": False},
    "clip_higher": {"grpo.clip_eps_high": 0.28},
    "on_policy": {"rl.minibatches": 1},
    "no_replay": {"rl.router_replay": False},
    "no_sharing": {"rl.share_prompt": False},
    "int8_rollouts": {"sampler.weights": "int8", "rl.old_logp": "policy"},
    "fp8_rollouts": {"sampler.weights": "fp8", "rl.old_logp": "policy"},
    "dynamic_sampling": {"rl.dynamic_sampling": True},
    # What a plan shows, and no curve.
    "gather": {"model.expert_exchange": "gather"},
    "all_to_all": {"model.expert_exchange": "all_to_all"},
    "ragged_all_to_all": {"model.expert_exchange": "ragged_all_to_all"},
    "bf16_moments": {"optim.moments_dtype": "bfloat16"},
    "remat_full": {"model.remat": "full"},
    # The last part of the report's schedule, *reported*.
    "late_length": {"rl.max_completion_tokens": 65_536, "rl.length_schedule": ()},
}


def apply(config: ConfigDict, name: str) -> ConfigDict:
    """The config with the named ablation (none for an empty name).

    Raises:
        ValueError: no such ablation.
    """
    if name and name not in ABLATIONS:
        near = difflib.get_close_matches(name, ABLATIONS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no ablation {name!r}{hint}. configs/ablations.py has {', '.join(ABLATIONS)}")
    config.update_from_flattened_dict(ABLATIONS.get(name, {}))
    return config
