"""Evaluation of a model on benchmarks, or on problems of your own:

    python -m r1jax.main --config=configs/eval.py --workdir=DIR --config.model.path=MODEL \\
        --config.eval.benchmarks='("math500=math500.jsonl", "aime24=aime24.jsonl", "gsm8k=tfds:gsm8k")'
    python -m r1jax.main --config=configs/eval.py --workdir=DIR --config.model.path=MODEL --config.data.source=FILE

Temperature, top-p, the longest completion and the forced opening are *reported* (arXiv 2501.12948, section 3), as are
the samples of AIME, GPQA, MATH-500 and LiveCodeBench (r1jax/benchmarks.py); hardware and duration depend on the model.
There is no system prompt.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Evaluation of the model at config.model.path by its own chat template."""
    config = base.get_config()
    config.stages = ("evaluate",)
    config.data.template = "chat"
    config.grading.marked_answers = False  # of other people's models, too
    config.data.max_prompt_tokens = 4096  # passages and tests of programs are long
    config.eval.update({"temperature": 0.6, "top_p": 0.95, "max_completion_tokens": 32_768, "opening": "<think>\n"})
    return config
