"""The ordered stages of a run: each starts from what the one before left; a run that was cut short goes on."""

import dataclasses
import difflib
import importlib
import json
import os
import pathlib
import time
import types
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

import r1jax
from r1jax import checkpoint, evaluate, hand_over, hosts, metrics, run, sharding, text
from r1jax.folders import Folder, folder_at
from r1jax.hand_over import page_of
from r1jax.model import convert, lora
from r1jax.model.config import ModelConfig
from r1jax.run import Policy, Run

# The pages of r1jax.studies, what the report tried and left.
STUDIES = ("ppo", "prm", "mcts")

# The pages of r1jax.stages and the studies, imported when they run. A stage of a run is one of these, or an entry of
# config.pipeline that names its page: the same page can be gone through several times with other settings.
PAGES = (
    *("pretrain", "sft", "cold_start", "reasoning_rl", "rejection_sft", "reward_models", "all_scenario_rl"),
    *("distill", "evaluate", *STUDIES),
)

# Stages that start from nothing rather than from the policy at config.model.path.
FROM_NOTHING = ("pretrain",)

# Bases that come with r1jax, by the value of config.model.path.
BASE = pathlib.Path(r1jax.__file__).parent / "base"
PACKAGED = {"": BASE} | {f"packaged:{name}": BASE.with_name(f"base_{name}") for name in ("bilingual", "student")}


def base_folder(model: Mapping[str, Any]) -> Folder:
    """The released-model folder that a run with these values of config.model begins with."""
    path = model["path"]
    if path.startswith("packaged:") and path not in PACKAGED:
        raise ValueError(f"config.model.path is {path!r}; packaged are {', '.join(filter(None, PACKAGED))}")
    return folder_at(PACKAGED.get(path, path))


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


def load_policy(
    config: ConfigDict,
    layouts: dict[str, sharding.Layout],
    folder: Folder | None = None,
    adapters: pathlib.Path | None = None,
) -> Policy:
    """The model in a folder, config.model.path's by default, or random weights if the first stage makes its own.

    With config.lora.rank what is trained are adapters, and the weights stay in the dtype that they are stored in.

    Args:
        adapters: the folder of those to go on with; None: fresh ones.
    """
    from_nothing = folder is None and starts_from_nothing(config.stages)
    folder = folder or base_folder(config.model)
    tokenizer = text.load_tokenizer(folder)
    model = model_config(config.stages, config.model) if from_nothing else convert.open_model(folder)[0]
    text.check_fits(tokenizer, model.vocab_size)
    run.param_shardings(model, layouts["train"])
    adapting = run.adapting(model, config.lora)
    if from_nothing:
        if adapting is not None:
            raise ValueError(f"config.lora.rank is {adapting.rank}, but {config.stages[0]} has no weights to adapt")
        return Policy(model, run.random_params(model, layouts["train"], config.seed), tokenizer, folder)
    with metrics.reading(f"weights from {folder}") as progress:
        dtype = "float32" if adapting is None else None
        model, params = convert.load(folder, layouts["train"].mesh, dtype, progress)
    if adapting is None:
        return Policy(model, params, tokenizer, folder)
    everywhere = layouts["train"].sharding()
    if adapters is not None:
        trained = hosts.put(lora.load_peft(adapters, model, adapting), everywhere)
        return Policy(model, trained, tokenizer, folder, adapting, params)
    key = jax.random.fold_in(jax.random.key(config.seed), run.ADAPTERS)
    make = jax.jit(partial(lora.init, model, adapting), out_shardings=everywhere)
    return Policy(model, make(key), tokenizer, folder, adapting, params)


def check_stages(config: ConfigDict) -> None:
    """Raises ValueError for an unknown stage or page, for none at all, and for settings that no key is for."""
    known = (*config.pipeline, *PAGES)
    for name in config.stages:
        if name not in known or page_of(config, name) not in PAGES:
            wanted, where = (known, "config.stages") if name not in known else (PAGES, f"config.pipeline.{name}.page")
            given = name if name not in known else page_of(config, name)
            near = difflib.get_close_matches(given, wanted, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where} names {given!r}, wanted {', '.join(wanted)}{hint}")
        stage_config(config, name)
    if not config.stages:
        raise ValueError(f"config.stages is empty; name at least one of {', '.join(known)}")


# Groups of the config that are tables of the user's: a stage replaces them whole.
TABLES = ("rewards", "reward_paths")

# Keys that the stages of a run share: they are read before any stage is, or by what lies between stages.
SHARED = ("seed", "stages", "pipeline", "cpu_devices", "lora", "mesh", "decode_mesh")
SHARED += ("model.path", "model.name", "eval.baseline")


def stage_config(config: ConfigDict, name: str) -> ConfigDict:
    """The config as the stage sees it: what config.pipeline.NAME holds in place of the values for all stages.

    Raises:
        ValueError: there is no such key, or no stage can have its own value of it.
    """
    own = config.copy_and_resolve_references()
    for group, value in config.pipeline.get(name, {}).items():
        if group in ("page", "start"):
            continue
        if group not in own or isinstance(value, ConfigDict) != isinstance(own[group], ConfigDict):
            raise ValueError(f"config.pipeline.{name}.{group}: there is no key config.{group}")
        for key in (group, *(f"{group}.{key}" for key in (value if isinstance(value, ConfigDict) else ()))):
            if key in SHARED:
                raise ValueError(
                    f"config.pipeline.{name}.{key} would be without effect: set config.{key}. What no stage can have a "
                    f"value of its own for: {', '.join(SHARED)}"
                )
        if group in TABLES or not isinstance(value, ConfigDict):
            own[group] = value
            continue
        for key, one in value.items():
            if key not in own[group]:
                near = difflib.get_close_matches(key, own[group], 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"config.pipeline.{name}.{group}.{key}: there is no key config.{group}.{key}{hint}")
            own[group][key] = one
    return own


def page_module(config: ConfigDict, name: str) -> types.ModuleType:
    """The module with the page of a stage."""
    page = page_of(config, name)
    return importlib.import_module(f"r1jax.{'studies' if page in STUDIES else 'stages'}.{page}")


def check_pages(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Asks those pages that can tell whether what they need from outside is there: before the first stage begins.

    They are told of the stages before them alone: only those can still leave something.
    """
    for i, name in enumerate(config.stages):
        if check := getattr(page_module(config, name), "check", None):
            own = stage_config(config, name)
            own.stages = config.stages[:i]
            check(own, workdir)


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
    """Runs all stages of a config in a run folder; returns the last policy.

    A stage that left its model is not gone through again, unless it is the last one.

    Raises:
        ValueError: something is wrong with the config or the folder; the message names the key.
        run.Stopped: SIGTERM came; the same command goes on.
    """
    started_s = time.monotonic()
    check_stages(config)
    folder = pathlib.Path(workdir).absolute()
    starts = [hand_over.start_of(config, i, folder) for i in range(len(config.stages))]
    check_pages(config, folder)
    folder.mkdir(parents=True, exist_ok=True)
    keep_config(config, folder)
    mesh = sharding.make_mesh(config.mesh.to_dict())
    layouts = sharding.layouts(mesh, config.decode_mesh.to_dict())

    def policy_of(name: str) -> Policy:
        weights, adapters = (of(config, name, folder) for of in (hand_over.adapted_by, hand_over.adapters_of))
        if config.lora.rank and adapters is None and run.adapters_folder(folder, name).exists():
            hosts.say(f"{name} left adapters of other settings than config.lora: its whole model gets fresh ones")
        return load_policy(config, layouts, weights, adapters)

    def sampler_of(name: str, before: Sequence[str]) -> Policy:
        return policy_of(hand_over.resolve(config, "config.curate.sampler", name, before, folder))

    summary = metrics.Summary(folder, started_s)
    this = Run(folder, config.seed, layouts, hosts.on_sigterm(), summary)
    name, policy = "base", policy_of("base")  # whose policy is at hand; another is read when its turn comes
    hand_over.check_kin(config, starts, policy, folder)
    hosts.say(plan(config, policy, mesh, folder))
    for i, (stage, start) in enumerate(zip(config.stages, starts, strict=True)):
        if hosts.agree(run.model_folder(folder, stage).exists()) and i + 1 < len(config.stages):
            hosts.say(f"{stage} is done: {run.model_folder(folder, stage)}")
            continue
        if start != name:
            policy = None  # two policies at once may not fit
            policy = policy_of(start)
        page, own = page_module(config, stage), stage_config(config, stage)
        here = dataclasses.replace(this, stage=stage, policy_of=partial(sampler_of, before=config.stages[:i]))
        policy = page.stage(here, own, policy)
        name = start if page_of(config, stage) in hand_over.HANDING_ON else stage
    evaluate.add_win_rates(summary.evals, config.eval.baseline)
    summary.write()
    left = [one for one in ("report.html", "models") if (folder / one).exists()]
    hosts.say(f"done; it left {', '.join(str(folder / one) for one in left)}")
    return policy
