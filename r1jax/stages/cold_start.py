"""Cold start (R1 report, section 2.3.1): a few readable chains, sampled from R1-Zero, teach the base how to begin.

Several completions per question at T = 1.0, kept when correct and readable, rewritten by an editor, then SFT of the
base: it gives Dev1.
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
    """Trains `policy`, the base, on what config.curate.sampler wrote; leaves data and model in WORKDIR.

    Raises:
        ValueError: no sample is good enough to learn from.
    """
    path = curate.gather(run, config, policy)
    return fine_tune(run, config, policy, str(path), f"the data of {run.stage}")
