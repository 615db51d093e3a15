"""Several layouts, or ablations of a config, planned one after the other; and which layouts a search tries."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import jax

from r1jax import run, sharding
from r1jax.model.config import ModelConfig
from r1jax.plan import layout as layout_names
from r1jax.plan import programs
from r1jax.plan.account import How, Plan, make_plan
from r1jax.plan.topology import Topology, open_topology

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the command line asks for; see --help."""

    model: str
    topology: str
    layouts: tuple[str, ...]
    is_search: bool
    ablations: tuple[str, ...]
    programs: tuple[str, ...]
    completion_tokens: float
    prompt_tokens: float
    how: How = dataclasses.field(default_factory=How)


@dataclasses.dataclass(frozen=True)
class Report:
    """Plans, and what was assumed."""

    title: str
    plans: tuple[Plan, ...]
    topology: Topology
    notes: tuple[str, ...]


def model_config(name: str) -> ModelConfig:
    """An entry of configs/models.py.

    Raises:
        ValueError: there is none of that name.
    """
    models = importlib.import_module("configs.models").MODELS
    if name not in models:
        raise ValueError(f"--model={name}: wanted one of {', '.join(models)}")
    return run.model_config(models[name])


def sensible(model: ModelConfig, devices: int) -> list[str]:
    """Layouts worth a try: tensor to sixteen at most, experts as far as they divide, fsdp for the rest."""
    tensors = [n for n in (1, 2, 4, 8, 16) if devices % n == 0 and model.num_attention_heads % n == 0]
    if model.attention == "gqa":
        tensors = [n for n in tensors if model.num_key_value_heads % n == 0]
    experts = [n for n in (8, 16, 32, 64) if devices % n == 0] if model.n_moe else [1]
    _, fsdp_axis, expert_axis, _, tensor_axis = sharding.AXES
    found = []
    for tensor in tensors:
        for expert in experts:
            fsdp, left = divmod(devices, tensor * expert)
            # As the rules of sharding.TRAIN spread experts and widths.
            spread = model.n_moe == 0 or model.n_routed_experts % (expert * tensor) == 0
            if fsdp and not left and spread and model.hidden_size % (fsdp * expert) == 0:
                found.append(layout_names.spell({fsdp_axis: fsdp, expert_axis: expert, tensor_axis: tensor}))
    return found


def compare(config: Any, asked: Asked, say: Say) -> Report:
    """Plans every layout and ablation asked for.

    Raises:
        ValueError: no such model, topology, layout or ablation, or something that does not divide.
    """
    topology = open_topology(asked.topology)
    model = model_config(asked.model or config.model.name)
    names = [*asked.layouts, *(sensible(model, len(topology.devices)) if asked.is_search else ())]
    load = programs.Load(asked.completion_tokens or config.rl.max_completion_tokens / 3, asked.prompt_tokens)
    ablations = importlib.import_module("configs.ablations")
    plans = []
    for name in dict.fromkeys(names):
        for ablation in ("", *asked.ablations):
            changed = ablations.apply(config.copy_and_resolve_references(), ablation)
            plans.append(plan(changed, model, topology, name, ablation, load, asked, say))
    chip, rl = topology.chip, config.rl
    notes = (
        f"{topology.chips} chips, {chip.peak / 1e12:.0f} TFLOP/s (bfloat16) and {chip.hbm / 1e9:.1f} GB a device; jax "
        f"{jax.__version__}. Times are estimates: the compiler's cycles, and models of kernels and interconnect.",
        f"assumed: {rl.group_size} completions for each of {rl.prompts_per_update * rl.minibatches} prompts a rollout, "
        f"{load.completion_tokens:,.0f} tokens each on average (at most {rl.max_completion_tokens:,}), prompts of "
        f"{load.prompt_tokens:,.0f}; grading and hosts cost nothing",
    )
    return Report(f"{config.model.name} on {topology.name}", tuple(plans), topology, notes)


def plan(
    config: Any,
    model: ModelConfig,
    topology: Topology,
    name: str,
    ablation: str,
    load: programs.Load,
    asked: Asked,
    say: Say,
) -> Plan:
    """One layout and ablation; a layout that cannot be is left to the caller as a ValueError."""
    train, decode = layout_names.parse(name, len(topology.devices))
    mesh = sharding.make_mesh(train, list(topology.devices))
    layouts = sharding.layouts(mesh, None if train == decode else decode)
    loop = programs.loop(config, model, layouts, load)
    meshes = {phase: layout.mesh for phase, layout in layouts.items()}
    return make_plan(f"{name}:{ablation}" if ablation else name, loop, topology, meshes, asked.programs, asked.how, say)
