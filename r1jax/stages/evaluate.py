"""Evaluation alone: config.eval.samples completions of every held-out problem, by any policy, and the report page.

The report samples at temperature 0.6 and top-p 0.95, k times per problem (R1 report, section 3): configs/eval.py.
"""

from ml_collections import ConfigDict

from r1jax import held_out, hosts, report
from r1jax.run import Policy, Run


def stage(run: Run, config: ConfigDict, policy: Policy) -> Policy:
    """Measures the policy and leaves it as it is; leaves WORKDIR/report.html.

    Raises:
        ValueError: there is nothing to evaluate on.
    """
    if not config.eval.problems:
        raise ValueError("config.eval.problems is 0: the stage evaluate has nothing to do")
    held_out.evaluate_policy(run, config, policy, 0)
    run.summary.write()
    if hosts.is_writer():
        report.write_report(run.workdir)
    return policy
