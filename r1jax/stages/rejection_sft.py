"""Rejection sampling and SFT (R1 report, section 2.3.3): the base learns from Dev2's correct, readable chains and more.

About 600,000 reasoning samples and 200,000 others (writing, factual questions, self-cognition, translation), two
epochs, from the base: it gives Dev3.
"""

from ml_collections import ConfigDict

from r1jax import curate
from r1jax.fine_tune import fine_tune
from r1jax.run import Policy, Run


def stage(run: Run, config: ConfigDict, policy: Policy) -> Policy:
    """Trains `policy`, the base, on what config.curate.sampler wrote and on config.curate.general.

    Raises:
        ValueError: no sample is good enough to learn from, or there is no general data where it is asked for.
    """
    path = run.workdir / "data" / f"{run.stage}.jsonl"
    if not path.exists():
        general = curate.general_data(config, run.seed)
        sampler = run.policy_of(config.curate.sampler) if config.curate.sampler else policy
        lines, counts = curate.reject(run, config, sampler)
        curate.write(run, lines + general, {"sampling": counts})
    return fine_tune(run, config, policy, str(path), f"the data of {run.stage}")
