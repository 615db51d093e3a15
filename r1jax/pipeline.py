"""The ordered stages of a run: each starts from what the one before left; a run that was cut short goes on."""

import difflib
import importlib
import json
import os
import pathlib
import time

import jax
from absl import logging
from ml_collections import ConfigDict

import r1jax
from r1jax import checkpoint, hosts, metrics, run, sharding, text
from r1jax.folders import folder_at
from r1jax.model import convert
from r1jax.run import Policy, Run

# Stage name -> its page; imported when it runs.
STAGES = {"pretrain": "r1jax.stages.pretrain", "reasoning_rl": "r1jax.stages.reasoning_rl"}

# Stages that start from nothing rather than from the policy at config.model.path.
FROM_NOTHING = ("pretrain",)

BASE = pathlib.Path(r1jax.__file__).parent / "base"


def load_policy(config: ConfigDict, layouts: dict[str, sharding.Layout]) -> Policy:
    """The model at config.model.path (empty: the packaged base), or random weights if the first stage makes its own."""
    folder = folder_at(config.model.path or BASE)
    tokenizer = text.load_tokenizer(folder)
    if config.stages[0] in FROM_NOTHING:
        models = importlib.import_module("configs.models").MODELS
        if config.model.name not in models:
            near = difflib.get_close_matches(config.model.name, models, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"config.model.name is {config.model.name!r}, wanted one of {', '.join(models)}{hint}")
        model = run.model_config(models[config.model.name])
        params = run.random_params(model, layouts["train"], config.seed)
    else:
        with metrics.reading(f"weights from {folder}") as progress:
            model, params = convert.load(folder, layouts["train"].mesh, "float32", progress)
        run.param_shardings(model, layouts["train"])
    text.check_fits(tokenizer, model.vocab_size)
    return Policy(model, params, tokenizer, folder)


def check_stages(stages: tuple[str, ...]) -> None:
    """Raises ValueError for an unknown stage or none at all."""
    for name in stages:
        if name not in STAGES:
            near = difflib.get_close_matches(name, STAGES, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"config.stages names {name!r}, wanted {', '.join(STAGES)}{hint}")
    if not stages:
        raise ValueError(f"config.stages is empty; name at least one of {', '.join(STAGES)}")


def keep_config(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Writes config.json, or says which keys differ from those that the run began with."""
    path = workdir / "config.json"
    now = json.loads(config.to_json_best_effort())
    if path.exists() and (workdir / "checkpoints").exists():  # without, it is of a run that could not begin
        try:
            before = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it to go on with the config given") from error
        for key in sorted(_flat(now).items() - _flat(before).items()):
            logging.warning("config.%s is now %s: this run folder began with another value", *key)
    if hosts.is_writer():
        hosts.atomic_write(path, json.dumps(now, indent=1) + "\n")


def _flat(tree: object, path: str = "") -> dict[str, str]:
    if isinstance(tree, dict):
        return {k: v for name, sub in tree.items() for k, v in _flat(sub, f"{path}.{name}".lstrip(".")).items()}
    return {path: json.dumps(tree)}


def plan(config: ConfigDict, policy: Policy, mesh: jax.sharding.Mesh, workdir: pathlib.Path) -> str:
    """One line on what the run is about to do."""
    n = sum(x.size for x in jax.tree.leaves(policy.params))
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    steps = {name: checkpoint.latest_step(workdir / "checkpoints" / name) for name in config.stages}
    stages = [name if at is None else f"{name} (from step {at} on)" for name, at in steps.items()]
    return (
        f"{' then '.join(stages)} of a policy of {n / 1e6:.2f}M parameters on {mesh.size} "
        f"{mesh.devices.flat[0].device_kind} device{'s' * (mesh.size > 1)}{axes and f' ({axes})'}, in {workdir}"
    )


def execute(config: ConfigDict, workdir: str | os.PathLike[str]) -> Policy:
    """Runs all stages of a config in a run folder.

    Raises:
        ValueError: something is wrong with the config or the folder; the message names the key.
        run.Stopped: SIGTERM came; the same command goes on.
    """
    started_s = time.monotonic()
    check_stages(config.stages)
    folder = pathlib.Path(workdir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    keep_config(config, folder)
    mesh = sharding.make_mesh(config.mesh.to_dict())
    layouts = sharding.layouts(mesh)
    this = Run(folder, config.seed, layouts, hosts.on_sigterm(), metrics.Summary(folder, started_s))
    policy = load_policy(config, layouts)
    hosts.say(plan(config, policy, mesh, folder))
    for name in config.stages:
        policy = importlib.import_module(STAGES[name]).stage(this, config, policy)
    this.summary.write()
    left = [name for name in ("report.html", "model") if (folder / name).exists()]
    hosts.say(f"done; it left {', '.join(str(folder / name) for name in left)}")
    return policy
