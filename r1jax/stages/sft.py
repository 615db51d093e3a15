"""Supervised fine-tuning on your own conversations, packed, with the loss on completions only (configs/sft.py)."""

from ml_collections import ConfigDict

from r1jax.fine_tune import fine_tune
from r1jax.run import Policy, Run


def stage(run: Run, config: ConfigDict, policy: Policy) -> Policy:
    """Trains the policy on config.sft.data; leaves a released-model folder in WORKDIR/models."""
    return fine_tune(run, config, policy, config.sft.data, "config.sft.data")
