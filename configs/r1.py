"""The whole of R1, small: python -m r1jax.main --config=configs/r1.py --workdir=DIR

R1-Zero, cold start (Dev1), reasoning RL (Dev2), rejection sampling and SFT of the base (Dev3), reward models, RL for
all scenarios (R1): on arithmetic problems in English and Chinese and on letters, from the packaged bilingual base.
Hardware: two CPU cores; 32 to 40 minutes, 3.4 GB. Expected on 256 held-out problems with seeds 0, 1, 2 (*measured*,
2026-11-28, see tests/bench/RESULTS.md): pass@1 of Zero 64.1, 68.2, 68.3%, of Dev1 55.6, 64.2, 62.9%, of Dev2 66.9,
65.4, 65.4%, of Dev3 71.8, 68.0, 68.1%, of R1 73.0, 66.7, 69.2%, of the base about 15%; in
the question's language Zero 60.8 to 65.9%, Dev2 96.2 to 98.3%, R1 99.0 to 99.3%; R1's letters win 66.2 to 69.8%
against Dev3's. All values are *our choice*.

    python -m r1jax.main --config=configs/r1.py:deepseek_v3 --workdir=DIR --config.model.path=MODEL ...

has the report's values, for models of configs/pods.py. No run of it has been made.
"""

from ml_collections import ConfigDict

from configs import base, pods

# What the report optimises in each RL stage; "worth" is the hidden rule for letters, watched and never rewarded.
WATCHED = {"accuracy": 1.0, "format": 1.0, "language": 0.0, "worth": 0.0}
CONSISTENT = {**WATCHED, "language": 1.0}


def reinforcement(updates: int, learning_rate: float) -> dict:
    """Settings of an RL stage."""
    return {
        "rl": {"updates": updates},
        "optim": {"learning_rate": learning_rate, "schedule": "cosine", "decay_steps": updates},
        "eval": {"every": -1},
    }


def get_config(model: str = "") -> ConfigDict:
    """The embedded run of all stages, or the published settings for a model of configs/pods.py.

    Raises:
        ValueError: there is no such model.
    """
    if model and model not in pods.RUNS:
        raise ValueError(f"there is no R1 of {model!r}, wanted one of {', '.join(pods.RUNS)}")
    return released(model) if model else embedded()


def embedded() -> ConfigDict:
    """All stages on the packaged base."""
    config = base.get_config()
    config.cpu_devices = 2
    config.mesh.update({"data": -1, "fsdp": 1})
    config.model.update({"path": "packaged:bilingual", "scan_unroll": 3})
    config.data.update({"source": "countdown_bilingual", "max_prompt_tokens": 32})
    config.rewards = ConfigDict(WATCHED)
    config.rl.update(base.EMBEDDED_RL)
    config.eval.update({"problems": 256, "samples": 16, "general": "letters", "baseline": "dev3"})
    config.sft.update({"rows": 16, "row_tokens": 320, "microbatch_rows": 16})
    config.optim.update({"learning_rate": 1e-3, "schedule": "cosine"})
    config.log.rollout_groups = 8
    config.preference.update(
        {
            "row_tokens": 40,
            "rows": 64,
            "epochs": 2.0,
            "valid_every": 100,
            "safety_responses": 4000,
            "from_update": 76,  # of 100: the report's share, the last 400 of 1,700
            "share": 0.75,
            "weight": 1.0,
        }
    )
    config.stages = ("zero", "dev1", "dev2", "dev3", "reward_models", "r1")
    zero, dev2 = reinforcement(56, 8e-4), reinforcement(36, 6e-4)
    zero["eval"] = {"every": 0}  # the base's row of the table
    config.pipeline = ConfigDict(
        {
            "zero": {"page": "reasoning_rl", "start": "base", **zero},
            "dev1": {
                "page": "cold_start",
                "start": "base",
                "curate": {"sampler": "zero", "prompts": 1024, "samples": 4, "editor": "tidy"},
                "sft": {"epochs": 4.0},
            },
            "dev2": {
                "page": "reasoning_rl",
                "start": "dev1",
                **dev2,
                "grpo": {"clip_eps_low": 10.0, "clip_eps_high": 10.0},
                "rewards": CONSISTENT,
            },
            "dev3": {
                "page": "rejection_sft",
                "start": "base",
                "curate": {"sampler": "dev2", "prompts": 3000, "samples": 2, "general": "letters"},
            },
            "reward_models": {
                "start": "dev3",
                "curate": {"samples": 128, "prompts": 1000},
                "optim": {"learning_rate": 1e-3},
                "eval": {"problems": 0},
            },
            "r1": {
                "page": "all_scenario_rl",
                "start": "dev3",
                "rl": {"updates": 100, "temperature": 0.7},
                "optim": {"learning_rate": 3.5e-4, "schedule": "constant"},
                "eval": {"every": 44},  # looks of the alarm: 0, 44, 88, 100
                "grpo": {"clip_eps_low": 10.0, "clip_eps_high": 10.0},
                "rewards": CONSISTENT,
            },
        }
    )
    return config


# Of both SFT stages; epochs, batch and context are config.sft's defaults.
TAUGHT = {"learning_rate": 5e-5, "schedule": "cosine", "final_share": 0.1}


def released(model: str) -> ConfigDict:
    """All stages as the report has them; R1-Zero's values are the defaults of configs/base.py.

    The user's own are the problems (config.data), general prompts with a judge of pairs and a rule or judge of what is
    safe (config.preference) and general conversations (config.curate.general).
    """
    config = pods.apply(base.get_config(), model)
    config.stages = ("zero", "dev1", "dev2", "dev3", "reward_models", "r1")
    rl = {
        "grpo": {"clip_eps_low": 10.0, "clip_eps_high": 10.0},
        "rewards": {"accuracy": 1.0, "format": 1.0, "language": 1.0},
    }
    config.pipeline = ConfigDict(
        {
            "zero": {"page": "reasoning_rl", "start": "base"},
            "dev1": {
                "page": "cold_start",
                "start": "base",
                # Thousands of chains: how many prompts and samples is our choice. An editor model rewrites them.
                "curate": {"sampler": "zero", "prompts": 8000, "samples": 8},
                "optim": TAUGHT,
            },
            "dev2": {
                "page": "reasoning_rl",
                "start": "dev1",
                **rl,
                # How many updates was not published.
                "rl": {"updates": 4000, "length_schedule": ()},
            },
            "dev3": {
                "page": "rejection_sft",
                "start": "base",
                # 600,000 samples of 80,000 problems; samples per prompt and cap are our choice.
                "curate": {"sampler": "dev2", "prompts": 80_000, "samples": 16, "keep_per_prompt": 8},
                "optim": TAUGHT,
            },
            "reward_models": {
                "start": "dev3",
                # 66,000 pairs and 106,000 labelled responses; a prompt gives one pair.
                "curate": {"prompts": 106_000, "samples": 2},
                "optim": {"learning_rate": 6e-6},
                "eval": {"problems": 0},
            },
            "r1": {
                "page": "all_scenario_rl",
                "start": "dev3",
                **rl,
                # 1,700 updates, made whole rollouts of 16; general prompts in the last 400.
                "rl": {"updates": 1696, "length_schedule": (), "temperature": 0.7},
                "preference": {"from_update": 1296},
                "eval": {"every": 96},
            },
        }
    )
    return config
