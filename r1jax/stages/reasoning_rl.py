"""Reasoning RL (R1 report, section 2.2): from the base, with accuracy and format as the only rewards, it is R1-Zero.

From Dev1, with the language-consistency reward added (config.rewards.language), it gives Dev2 (section 2.3.2).
"""

from ml_collections import ConfigDict

from r1jax.reinforce import reinforce
from r1jax.run import Policy, Run


def stage(run: Run, config: ConfigDict, policy: Policy) -> Policy:
    """Trains the policy by GRPO; leaves a released-model folder in WORKDIR/models and WORKDIR/report.html."""
    return reinforce(run, config, policy)
