"""A whole run in miniature: a random policy of 40,000 weights, the ways to start it and to read what it left."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
from ml_collections import ConfigDict

import r1jax
from configs import zero
from r1jax import hosts, pipeline, run, sharding
from r1jax.model import convert, transformer

ROOT = pathlib.Path(r1jax.__file__).resolve().parent.parent
STAGE = "reasoning_rl"

POLICY = run.model_config(
    {
        "vocab_size": 512,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "attention": "mla",
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 1024,
    }
)
# A random policy solves nothing, so the reward is one that its completions differ in.
REWARDS = """
import time


def variety(prompt, completion, example, **context):
    return len(set(completion)) % 4 / 4


def broken(prompt, completion, example, **context):
    raise RuntimeError("as a user's function may")


def undefined(prompt, completion, example, **context):
    return float("nan")


def patient(prompt, completion, example, **context):
    if completion == "STALL":
        time.sleep(600)
    return 1.0
"""
SETTINGS = {
    "rl.updates": 6,
    "rl.minibatches": 2,
    "rl.prompts_per_update": 2,
    "rl.group_size": 4,
    "rl.max_completion_tokens": 12,
    "rl.row_tokens": 64,
    "rl.microbatch_rows": 4,
    "rl.reference_every": 2,
    "grpo.kl_coef": 0.05,
    "optim.learning_rate": 0.01,
    "sampler.slots": 16,
    "sampler.tokens_per_dispatch": 4,
    "sampler.prefill_prompts": 4,
    "eval.problems": 3,
    "eval.samples": 4,
    "checkpoint.save_every": 2,
    "grading.workers": 0,
    "log.rollout_groups": 4,
}


def make_policy(folder: pathlib.Path, deviation: float = 0.1) -> None:
    """A released-model folder with random weights, and the user's rewards beside them."""
    rng = np.random.default_rng(0)
    shapes = transformer.shapes(POLICY)
    params = jax.tree.map(lambda leaf: rng.normal(0, deviation, leaf.shape).astype(np.float32), shapes)
    convert.save(params, POLICY, folder, {"tokenizer.model": (pipeline.BASE / "tokenizer.model").read_bytes()})
    (folder / "rewards.py").write_text(REWARDS)


def settings(policy: pathlib.Path, **changes: Any) -> dict[str, Any]:
    """Values by dotted key; `changes` has __ for the dots."""
    paths = {"rewards": {"accuracy": 1.0, "variety": 1.0}, "reward_paths": {"variety": f"{policy}/rewards.py:variety"}}
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    return {"model.path": str(policy), **SETTINGS, **paths, **changed}


def make_config(policy: pathlib.Path, **changes: Any) -> ConfigDict:
    """The config of the run, as configs/zero.py and flags would make it."""
    config = zero.get_config()
    for key, value in settings(policy, **changes).items():
        *groups, name = key.split(".")
        group = config
        for one in groups:
            group = group[one]
        group[name] = ConfigDict(value) if isinstance(value, dict) else value
    return config


@contextlib.contextmanager
def quick_compilation() -> Iterator[None]:
    """Compiling is most of the time that a run in miniature takes, and optimizing most of that."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def execute(config: ConfigDict, workdir: pathlib.Path, stop: hosts.Stop | None = None) -> run.Policy:
    """The run in this process, on one of its devices; `stop` is what SIGTERM would set."""
    make_mesh = sharding.make_mesh
    with (
        quick_compilation(),
        mock.patch.object(sharding, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1])),
        mock.patch.object(hosts, "on_sigterm", lambda: stop or hosts.Stop()),
    ):
        return pipeline.execute(config, workdir)


def command(*arguments: str) -> subprocess.Popen:
    """The command in a process of its own, with one device."""
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    env = {**quick, **os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-m", "r1jax.main", *arguments]
    return subprocess.Popen(words, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run_main(*arguments: str) -> tuple[int, str]:
    """Exit code and everything that the command printed."""
    process = command(*arguments)
    text = process.communicate(timeout=600)[0]
    return process.returncode, text


def arguments(policy: pathlib.Path, workdir: pathlib.Path, **changes: Any) -> list[str]:
    """What to write after the command for the run of `make_config`."""
    flags = [f"--config.{key}={value}" for key, value in settings(policy, **changes).items()]
    return ["--config=configs/zero.py", f"--workdir={workdir}", *flags]


def metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines() if (workdir / "metrics.jsonl").exists() else []
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if k.split("/")[0] not in ("time", "throughput")} for r in records]


def outcome(workdir: pathlib.Path) -> dict[str, Any]:
    """Everything that a run leaves and that has to be alike, bit for bit, in one that was cut short and went on."""
    return {
        "policy": (workdir / "models" / STAGE / "model.safetensors").read_bytes(),
        "metrics": metrics(workdir),
        "rollouts": {path.name: path.read_bytes() for path in sorted((workdir / "rollouts").iterdir())},
        "evals": json.loads((workdir / "summary.json").read_text())["evals"],
    }
