"""Distillation of what R1 wrote into a small dense model, and the same model by RL alone beside it:

    python -m r1jax.main --config=configs/r1.py --workdir=runs/r1              writes runs/r1/data/dev3.jsonl
    python -m r1jax.main --config=configs/distill.py --workdir=runs/distill
    python -m r1jax.main --config=configs/distill.py:qwen_7b --workdir=DIR --config.model.path=MODEL \\
        --config.sft.data=FILE.jsonl

Without a name it is the packaged student (0.47M parameters), whose values are *our choice*. The others (qwen_1_5b,
qwen_7b, qwen_14b, qwen_32b, llama_8b, llama_70b) have the *reported* settings of the six students (arXiv 2501.12948,
supplement on distillation); those of RL alone are the report's for the 32B one. Expected of the packaged one, seed 0
(*measured*, 2026-11-23, tests/bench/RESULTS.md): pass@1 9.9% before, 26.2% by RL alone with 1.08 times the operations,
45.8% distilled; majority of 16 26.6%, 41.0%, 76.2%.
"""

from ml_collections import ConfigDict

from configs import base

# Learning rates of the report's students.
STUDENTS = {
    "qwen_1_5b": 1e-4,
    "qwen_7b": 8e-5,
    "qwen_14b": 7e-5,
    "qwen_32b": 6e-5,
    "llama_8b": 5e-5,
    "llama_70b": 2e-5,
}


def get_config(student: str = "") -> ConfigDict:
    """The embedded comparison, or the published settings of one of STUDENTS.

    Raises:
        ValueError: there is no such student.
    """
    if student and student not in STUDENTS:
        raise ValueError(f"there is no student {student!r}, wanted one of {', '.join(STUDENTS)}")
    return released(STUDENTS[student]) if student else embedded()


def embedded() -> ConfigDict:
    """RL alone, then distillation, each from the packaged student."""
    config = base.get_config()
    config.cpu_devices = 2
    config.mesh.update({"data": -1, "fsdp": 1})
    config.model.update({"path": "packaged:student", "scan_unroll": 4})
    config.data.update({"source": "countdown_bilingual", "max_prompt_tokens": 32})
    # Watched and not rewarded: the language of the thought, and what letters are worth.
    config.rewards = ConfigDict({"accuracy": 1.0, "format": 1.0, "language": 0.0, "worth": 0.0})
    config.rl.update({**base.EMBEDDED_RL, "updates": 64})
    config.eval.update({"problems": 256, "samples": 16, "general": "letters", "baseline": "rl_alone"})
    config.sft.update({"data": "runs/r1/data/dev3.jsonl", "epochs": 3.0, "rows": 16, "row_tokens": 320})
    config.optim.update({"learning_rate": 1e-3, "schedule": "cosine"})
    config.log.rollout_groups = 8
    config.stages = ("rl_alone", "distill")
    alone = {"optim": {"learning_rate": 8e-4}}
    config.pipeline = ConfigDict(
        {"rl_alone": {"page": "reasoning_rl", "start": "base", **alone}, "distill": {"start": "base"}}
    )
    return config


def released(learning_rate: float) -> ConfigDict:
    """SFT of the base model at config.model.path; config.stages may name rl_alone as well, with data of its own."""
    config = base.get_config()
    config.stages = ("distill",)
    config.model.update({"compute_dtype": "bfloat16", "cache_dtype": "bfloat16", "remat": "full"})
    config.data.template = "chat"
    config.sft.update({"epochs": 2.0, "rows": 64, "row_tokens": 32_768})
    config.optim.update({"learning_rate": learning_rate, "schedule": "cosine", "final_share": 0.1})
    config.eval.problems = 0  # the problems are the user's: config.data and config.eval say which
    alone = {"rl": {"updates": 10_000}, "optim": {"learning_rate": 2e-6, "schedule": "constant"}}
    alone |= {"data": {"template": "r1_zero"}}
    config.pipeline = ConfigDict({"rl_alone": {"page": "reasoning_rl", "start": "base", **alone}})
    return config
