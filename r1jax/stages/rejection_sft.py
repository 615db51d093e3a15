"""Rejection sampling and SFT (R1 report, section 2.3.3): the base learns from Dev2's correct, readable chains and more.

About 600,000 reasoning samples and 200,000 others (writing, factual questions, self-cognition, translation), two
epochs, from the base: it gives Dev3.
"""

import pathlib

from ml_collections import ConfigDict

from r1jax import checks, curate
from r1jax.fine_tune import fine_tune
from r1jax.run import Policy, Run


def check(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Raises ValueError where a filter, editor, judge, sampler or general file of config.curate is not there."""
    checks.check_curation(config, workdir)


def stage(run: Run, config: ConfigDict, policy: Policy) -> Policy:
    """Trains `policy`, the base, on what config.curate.sampler wrote and on config.curate.general.

    Raises:
        ValueError: no sample is good enough to learn from, or there is no general data where it is asked for.
    """
    path = curate.gather(run, config, policy)
    return fine_tune(run, config, policy, str(path), f"the data of {run.stage}")
