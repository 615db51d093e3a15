"""Evaluation alone: config.eval.samples completions of every held-out problem, by any policy, and the report page.

The report samples at temperature 0.6 and top-p 0.95, k times per problem (R1 report, section 3): configs/eval.py.
"""

from ml_collections import ConfigDict

from r1jax import held_out, hosts, loops, report
from r1jax.rollout import Interrupted
from r1jax.run import Policy, Run, Stopped, check_lengths, open_pool

STAGE = "evaluate"


def stage(run: Run, config: ConfigDict, policy: Policy) -> Policy:
    """Measures the policy and leaves it as it is; leaves WORKDIR/report.html.

    Raises:
        ValueError: there is nothing to evaluate on.
    """
    limit = config.eval.max_completion_tokens or config.rl.max_completion_tokens
    check_lengths(policy, config.data.max_prompt_tokens, limit)
    if not config.eval.problems:
        raise ValueError("config.eval.problems is 0: the stage evaluate has nothing to do")
    with open_pool(config) as pool:
        problems = held_out.prepare(run, STAGE, config, policy, pool)
        weights = loops.decode_layout(policy, run.layouts["decode"], config.model.compute_dtype)(policy.params)
        try:
            problems.measure(weights, 0, limit)
        except Interrupted as stopped:
            raise Stopped from stopped
    run.summary.write()
    if hosts.is_writer():
        report.write_report(run.workdir)
    return policy
