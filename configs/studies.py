"""What the R1 report tried and left, small: python -m r1jax.main --config=configs/studies.py:NAME --workdir=DIR

NAME is ppo, ppo_short_sighted, prm or mcts. No name is GRPO, the run that PPO is beside: `python -m r1jax.ablate
--config=configs/studies.py --ablations=ppo,ppo_short_sighted --workdir=DIR` runs all three and writes the table. All
values are *our choice*, on the packaged base and two CPU cores. *Measured* (2026-11-28, seed 0, RESULTS.md): the three
runs of ablate 4.9 minutes, prm 5.0, mcts 3.5; PPO as good as GRPO with twice the state, PPO with lambda 0.95 worse than
the base; best of 16 by step scores 72.7% where the majority is right in 46.1%; search worse than sampling.
"""

import difflib
from typing import Any

from ml_collections import ConfigDict

from configs import zero

STUDIES: dict[str, dict[str, Any]] = {
    "": {},
    "ppo": {"stages": ("ppo",)},
    "ppo_short_sighted": {"stages": ("ppo",), "ppo.gae_lambda": 0.95},
    # Both judge the packaged base, whose first sample is seldom right and one of sixteen nearly always.
    "prm": {
        "stages": ("prm",),
        "rl.updates": 32,
        "optim.decay_steps": 32,
        "curate.prompts": 256,
        "curate.samples": 4,
        "prm.continuations": 4,
        "value_model.epochs": 2.0,
        "eval.samples": 16,
        "eval.every": 0,
    },
    "mcts": {
        "stages": ("mcts",),
        "curate.prompts": 512,
        "curate.samples": 4,
        "value_model.epochs": 2.0,
        "mcts.segment_tokens": 24,
        "mcts.budgets": (256, 512, 1024),
        "eval.problems": 64,
        "eval.samples": 48,
    },
}


def get_config(name: str = "") -> ConfigDict:
    """configs/zero.py with fewer updates, and a study.

    Raises:
        ValueError: no such study.
    """
    if name not in STUDIES:
        near = difflib.get_close_matches(name, STUDIES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no study {name!r}{hint}. configs/studies.py has {', '.join(filter(None, STUDIES))}")
    config = zero.get_config()
    config.rl.updates = 16
    config.optim.decay_steps = 16
    config.eval.update({"problems": 128, "samples": 4, "every": -1})
    config.ppo.update({"value_learning_rate": 8e-4, "value_clip": 0.5})  # rewards go from 0 to 2
    config.value_model.update({"learning_rate": 5e-4, "rows": 16})
    config.update_from_flattened_dict(STUDIES[name])
    return config
