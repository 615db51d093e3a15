"""Evaluation alone: benchmarks, or the held-out problems of config.data, by any policy, and the report page.

The report samples at temperature 0.6 and top-p 0.95, k times per problem (R1 report, section 3): configs/eval.py.
"""

from ml_collections import ConfigDict

from r1jax import examine, held_out, hosts, report
from r1jax.run import Policy, Run


def stage(run: Run, config: ConfigDict, policy: Policy) -> Policy:
    """Measures the policy, on benchmarks if config.eval names any, and leaves it; leaves WORKDIR/report.html.

    Raises:
        ValueError: there is nothing to evaluate on.
    """
    if config.eval.benchmarks:
        examine.evaluate_benchmarks(run, config, policy)
    elif config.eval.problems:
        held_out.evaluate_policy(run, config, policy, 0)
    else:
        raise ValueError(
            "the stage evaluate has nothing to do: config.eval.benchmarks is empty and config.eval.problems is 0"
        )
    run.summary.write()
    if hosts.is_writer():
        report.write_report(run.workdir)
    return policy
