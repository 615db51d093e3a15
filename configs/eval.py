"""Evaluation of a model, pass@1 as a mean over samples and the majority vote:

    python -m r1jax.main --config=configs/eval.py --workdir=DIR --config.model.path=MODEL --config.data.source=FILE

Temperature, top-p and the longest completion are *reported* (arXiv 2501.12948, section 3); hardware and duration depend
on the model.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Evaluation of the model at config.model.path by its own chat template."""
    config = base.get_config()
    config.stages = ("evaluate",)
    config.data.template = "chat"
    config.grading.marked_answers = False  # of other people's models, too
    config.eval.update({"temperature": 0.6, "top_p": 0.95, "max_completion_tokens": 32_768})
    return config
