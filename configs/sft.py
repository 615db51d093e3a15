"""Supervised fine-tuning on your own conversations, with the report's schedule:

    python -m r1jax.main --config=configs/sft.py --workdir=DIR --config.model.path=MODEL --config.sft.data=FILE.jsonl

A line of the file is {"messages": [{"role": ..., "content": ...}, ...]}; the loss is on the assistant's last message.
Epochs, batch, context and learning rates are *reported* (arXiv 2501.12948, supplement on SFT); hardware and duration
depend on the model.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """SFT of the model at config.model.path by its own chat template."""
    config = base.get_config()
    config.stages = ("sft",)
    config.data.template = "chat"
    config.optim.update({"learning_rate": 5e-5, "schedule": "cosine", "final_share": 0.1})
    return config
