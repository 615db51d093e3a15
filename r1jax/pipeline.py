"""The ordered stages of a run: each starts from what the one before left; a run that was cut short goes on."""

import difflib
import importlib
import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

import r1jax
from r1jax import checkpoint, hosts, metrics, run, sharding, text
from r1jax.folders import Folder, folder_at
from r1jax.model import convert, lora
from r1jax.model.config import ModelConfig
from r1jax.run import Policy, Run

# Stage name -> its page; imported when it runs.
STAGES = {name: f"r1jax.stages.{name}" for name in ("pretrain", "sft", "reasoning_rl", "evaluate")}

# Stages that start from nothing rather than from the policy at config.model.path.
FROM_NOTHING = ("pretrain",)

BASE = pathlib.Path(r1jax.__file__).parent / "base"


def base_folder(model: Mapping[str, Any]) -> Folder:
    """The released-model folder that a run with these values of config.model begins with."""
    return folder_at(model["path"] or BASE)


def starts_from_nothing(stages: Sequence[str]) -> bool:
    """Whether the first stage makes its own weights."""
    return stages[0] in FROM_NOTHING


def model_config(stages: Sequence[str], model: Mapping[str, Any]) -> ModelConfig:
    """The architecture of a run, from its base folder or, if it starts from nothing, from configs/models.py.

    Raises:
        ValueError: there is no such model.
    """
    if not starts_from_nothing(stages):
        return convert.open_model(base_folder(model))[0]
    models, name = importlib.import_module("configs.models").MODELS, model["name"]
    if name not in models:
        near = difflib.get_close_matches(name, models, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"config.model.name is {name!r}, wanted one of {', '.join(models)}{hint}")
    return run.model_config(models[name])


def load_policy(config: ConfigDict, layouts: dict[str, sharding.Layout]) -> Policy:
    """The model at config.model.path (empty: the packaged base), or random weights if the first stage makes its own.

    With config.lora.rank what is trained are adapters, and the weights stay in the dtype that they are stored in.
    """
    folder = base_folder(config.model)
    tokenizer = text.load_tokenizer(folder)
    model = model_config(config.stages, config.model)
    text.check_fits(tokenizer, model.vocab_size)
    run.param_shardings(model, layouts["train"])
    adapting = run.adapting(model, config.lora)
    if starts_from_nothing(config.stages):
        if adapting is not None:
            raise ValueError(f"config.lora.rank is {adapting.rank}, but {config.stages[0]} has no weights to adapt")
        return Policy(model, run.random_params(model, layouts["train"], config.seed), tokenizer, folder)
    with metrics.reading(f"weights from {folder}") as progress:
        dtype = "float32" if adapting is None else None
        model, params = convert.load(folder, layouts["train"].mesh, dtype, progress)
    if adapting is None:
        return Policy(model, params, tokenizer, folder)
    key = jax.random.fold_in(jax.random.key(config.seed), run.ADAPTERS)
    make = jax.jit(partial(lora.init, model, adapting), out_shardings=layouts["train"].sharding())
    return Policy(model, make(key), tokenizer, folder, adapting, params)


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
    n, trained = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (policy.frozen, policy.params))
    kind = f"policy of {trained / 1e6:.2f}M parameters"
    if policy.lora is not None:
        kind = f"policy of {n / 1e6:.2f}M frozen parameters with {trained / 1e6:.2f}M in adapters"
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    steps = {name: checkpoint.latest_step(workdir / "checkpoints" / name) for name in config.stages}
    stages = [name if at is None else f"{name} (from step {at} on)" for name, at in steps.items()]
    return (
        f"{' then '.join(stages)} of a {kind} on {mesh.size} "
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
    layouts = sharding.layouts(mesh, config.decode_mesh.to_dict())
    this = Run(folder, config.seed, layouts, hosts.on_sigterm(), metrics.Summary(folder, started_s))
    policy = load_policy(config, layouts)
    hosts.say(plan(config, policy, mesh, folder))
    for name in config.stages:
        policy = importlib.import_module(STAGES[name]).stage(this, config, policy)
    this.summary.write()
    left = [name for name in ("report.html", "model") if (folder / name).exists()]
    hosts.say(f"done; it left {', '.join(str(folder / name) for name in left)}")
    return policy
