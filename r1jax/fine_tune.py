"""Supervised fine-tuning of a policy on a file of conversations: what cold start, rejection sampling and SFT end with.

Two or three epochs, a cosine from 5e-5 to a tenth (R1 report, sections 2.3.1, 2.3.3 and 2.4: configs/sft.py).
"""

import dataclasses

from r1jax import conversations, examine, held_out, hosts, next_token, report, sources
from r1jax.run import Config, Policy, Run, export, open_checkpoints, optim_config, training_program
from r1jax.types import Example, Params


def questions(path: str, key: str) -> list[Example]:
    """What the user says in the conversations of a file, which an evaluation must not ask again."""
    messages = (message for _, record in sources.read_records(path, key) for message in record["messages"])
    return [{"question": message["content"]} for message in messages if message["role"] == "user"]


def fine_tune(run: Run, config: Config, policy: Policy, data: str, key: str) -> Policy:
    """Trains the policy on the conversations in `data` and evaluates it; leaves its model in WORKDIR/models and a page.

    Evaluated are config.eval.problems every config.eval.every steps, if that is above 0, and at the end, when
    config.eval.benchmarks are as well.

    Raises:
        ValueError: no conversation there that fits; names `key`, the config key that says which file it is.
    """
    c = config["sft"]

    def read(path: str, key: str) -> conversations.Packed:
        return conversations.read(path, key, policy.tokenizer, config["data"]["template"], c["row_tokens"])

    given, valid = read(data, key), read(c["valid_data"], "config.sft.valid_data") if c["valid_data"] else None
    steps = max(1, round(c["epochs"] * len(given.rows.tokens) / c["rows"]))
    left_out = f"; {given.too_long} that are longer than a row are left out" if given.too_long else ""
    hosts.say(
        f"{given.conversations:,} conversations in {len(given.rows.tokens):,} rows of {c['row_tokens']:,} tokens, "
        f"{c['epochs']:g} epochs of them in {steps:,} steps{left_out}"
    )
    every, trained_on = config["eval"]["every"], questions(data, key)
    on_benchmarks = examine.open_benchmarks(run, config, policy, trained_on)
    with held_out.measuring(run, config, policy, trained_on) as measure:

        def evaluate(params: Params, step: int) -> None:
            if every > 0 and step > 0 and step % every == 0:
                measure(params, step)

        params = next_token.train(
            run,
            policy,
            training_program(config, policy, run.layouts["train"]),
            optim_config(config, steps),
            given.rows,
            valid.rows if valid else None,
            next_token.Schedule(steps, c["rows"], c["valid_every"], c["valid_rows"], c["microbatch_rows"]),
            open_checkpoints(run, config["checkpoint"]),
            evaluate,
        )
        # What is measured last stands for the stage: the problems.
        on_benchmarks(dataclasses.replace(policy, params=params), steps)
        measure(params, steps)
    policy = export(run, policy, params)
    run.summary.write()
    if hosts.is_writer():
        report.write_report(run.workdir)
    return policy
