"""Several layouts, or ablations of a config, planned one after the other; and which layouts a search tries."""

import dataclasses
import importlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from r1jax import run, sharding
from r1jax.model import transformer
from r1jax.model.config import ModelConfig
from r1jax.plan import layout as layout_names
from r1jax.plan import programs, schedule
from r1jax.plan.account import How, Plan, bound, make_plan
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


# How many layouts a search compiles, our choice: of a large mixture an update takes minutes, a whole loop many.
TRIED = 6  # of these update alone
WHOLE = 2  # of these the whole loop
SEARCHED = (
    f"search: of the layouts that fit by their arguments alone, update is compiled for the {TRIED} with the least to "
    f"read in decoding, and the whole loop for the fastest of these until {WHOLE} fit"
)

LONG_TOKENS = 16_384  # rows from which a search also splits each over `context`: our choice


def sensible(model: ModelConfig, devices: int, slices: int = 1, longest: int = 0) -> list[str]:
    """Layouts worth a try, data over the slices: tensor to sixteen at most, experts as far as they divide, fsdp for the
    rest; fsdp alone; one with context where completions are long; one with another mesh for decoding.

    Raises:
        ValueError: not one divides; says what stands against those that were looked at.
    """
    data_axis, fsdp_axis, expert_axis, context_axis, tensor_axis = sharding.AXES
    inside = devices // slices
    shapes, axes = transformer.shapes(model), transformer.logical_axes(model)
    against: dict[str, str] = {}

    def fits(**sizes: int) -> str:
        """The layout's name, empty where something does not divide."""
        left, over = divmod(inside, math.prod(sizes.values()))
        if over or not left:
            return ""
        named = {data_axis: slices, fsdp_axis: left, **sizes}
        name = layout_names.spell(named)
        mesh = jax.sharding.AbstractMesh(tuple(named.get(axis, 1) for axis in sharding.AXES), sharding.AXES)
        try:
            for rules in sharding.PHASES.values():
                sharding.check_divides(axes, shapes, sharding.Layout(mesh, rules))
        except ValueError as error:
            against[name] = str(error)
            return ""
        return name

    experts = [min(n, inside) for n in (8, 16, 32, 64)] if model.n_moe else [1]
    found = [fits(**{tensor_axis: tensor, expert_axis: n}) for tensor in (1, 2, 4, 8, 16) for n in experts]
    found = [name for name in dict.fromkeys(found) if name]
    if model.n_moe:
        alone = fits()
        # Experts over everything while they are read once a token, the widest layout while training.
        decode = fits(**{expert_axis: math.gcd(model.n_routed_experts, inside)})
        train = found[-1] if found else alone
    else:
        alone, train, decode = "", found[0] if found else "", found[-1] if found else ""
    long = fits(**{context_axis: 8, expert_axis: experts[0]}) if longest >= LONG_TOKENS else ""
    apart = f"{train}/{decode}" if train and decode and train != decode else ""
    found = [name for name in dict.fromkeys((*found, alone, long, apart)) if name]
    if not found:
        why = "; ".join(f"{name}: {said}" for name, said in list(against.items())[:3])
        raise ValueError(f"--search: no layout fits {devices} devices in {slices} slices. {why}")
    return found


def _with_room(config: Any, decode: sharding.Layout) -> str:
    """Raises the sampler's sizes to multiples of the devices that they are spread over; says which."""
    said = []
    for key, axis in (("slots", "slots"), ("prefill_prompts", "rows")):
        have, each = config.sampler[key], decode.size(axis)
        if have % each:
            config.sampler[key] = -(-have // each) * each
            said.append(f"sampler.{key}={config.sampler[key]}")
    return ", ".join(said)


def compare(config: Any, asked: Asked, say: Say, keep: Callable[[Report], None] = lambda report: None) -> Report:
    """Plans every layout and ablation asked for. What fails is a plan that says why, and the others go on.

    Args:
        keep: is given what there is after each.

    Raises:
        ValueError: no such model, topology, axis or ablation, or nothing that a search could try.
    """
    topology = open_topology(asked.topology)
    model = model_config(asked.model or config.model.name)
    devices, names = len(topology.devices), list(asked.layouts)
    for name in names:
        layout_names.parse(name, devices)  # what is misspelt is said before hours are spent
    ablations = importlib.import_module("configs.ablations")
    variants = {a: ablations.apply(config.copy_and_resolve_references(), a) for a in ("", *asked.ablations)}
    chip, rl = topology.chip, config.rl
    notes = (
        f"{topology.chips} chips, {chip.peak / 1e12:.0f} TFLOP/s (bfloat16) and {chip.hbm / 1e9:.1f} GB a device; jax "
        f"{jax.__version__}. Times are estimates: the compiler's cycles, and models of kernels and interconnect.",
        f"assumed: {rl.group_size} completions for each of {rl.prompts_per_update * rl.minibatches} prompts a rollout, "
        f"{_load(config, asked).completion_tokens:,.0f} tokens each on average (at most {rl.max_completion_tokens:,}), "
        f"prompts of {asked.prompt_tokens:,.0f}; grading and hosts cost nothing",
        "the rollout is an upper bound: every dispatch has all slots live, where a run drops to a quarter of them as "
        "completions end; the cache grows with the longest completion",
    )
    report = Report(f"{config.model.name} on {topology.name}", (), topology, notes)

    def add(plan: Plan) -> Plan:
        """To the report, in the place of what was known of the same layout before."""
        nonlocal report
        plans = {p.layout: p for p in report.plans} | {plan.layout: plan}
        report = dataclasses.replace(report, plans=tuple(plans.values()))
        keep(report)
        return plan

    if asked.is_search:
        report = dataclasses.replace(report, notes=(*notes, SEARCHED))
        names += search(config, model, topology, asked, say, add)
    for name in dict.fromkeys(names):
        for ablation, changed in variants.items():
            if ablation or not any(p.layout == name and not p.skipped for p in report.plans):
                add(plan(changed, model, topology, name, ablation, asked, say))
    return report


def search(
    config: Any, model: ModelConfig, topology: Topology, asked: Asked, say: Say, add: Callable[[Plan], Plan]
) -> list[str]:
    """Plans the sensible layouts, each as far as it is promising; gives the names of those planned as a whole.

    With programs asked for, the first round compiles these, and is the last.

    Args:
        add: is given every plan, and in its place the one that knows more.

    Raises:
        ValueError: there is nothing to try.
    """
    names = sensible(model, len(topology.devices), topology.slices, config.rl.max_completion_tokens)
    made = partial(plan, config, model, topology, ablation="", asked=asked, say=say)
    compiled = partial(make_plan, how=asked.how, say=say)
    known = [add(made(name, make=lambda shown, loop, topology, _: bound(shown, loop, topology))) for name in names]
    known = sorted((p for p in known if p.fits), key=lambda p: p.least_s)
    for p in known[TRIED:]:
        why = f"a rollout reads weights and caches for {p.least_s:,.0f} s at least, longer than with {TRIED} others"
        add(dataclasses.replace(p, skipped=f"not compiled: {why}"))
    tried, order = [], []
    for p in known[:TRIED]:
        one = made(p.layout, make=partial(compiled, only=asked.programs or ("update",)))
        skipped = "" if asked.programs or one.failed else "only update was compiled"
        tried.append(add(dataclasses.replace(one, skipped=skipped)))
        order.append((math.isnan(one.updates_s), p.least_s + one.updates_s))
    if asked.programs:
        return [p.layout for p in tried]
    whole: list[Plan] = []
    for _, p in sorted(zip(order, tried, strict=True), key=lambda item: item[0]):
        if p.fits and sum(w.fits for w in whole) < WHOLE:
            whole.append(add(made(p.layout, make=partial(compiled, only=(), known=p.rows))))
    return [p.layout for p in whole]


def _load(config: Any, asked: Asked) -> programs.Load:
    return programs.Load(asked.completion_tokens or config.rl.max_completion_tokens / 3, asked.prompt_tokens)


Make = Callable[[str, programs.Loop, Topology, dict[str, jax.sharding.Mesh]], Plan]


def plan(
    config: Any,
    model: ModelConfig,
    topology: Topology,
    name: str,
    ablation: str,
    asked: Asked,
    say: Say,
    make: Make | None = None,
) -> Plan:
    """One layout and ablation, by default all programs asked for compiled; of one that cannot be, why."""
    shown, settings, config = f"{name}:{ablation}" if ablation else name, "", config.copy_and_resolve_references()
    try:
        train, decode = layout_names.parse(name, len(topology.devices))
        mesh = sharding.make_mesh(train, list(topology.devices))
        layouts = sharding.layouts(mesh, None if train == decode else decode)
        if asked.is_search:
            settings = _with_room(config, layouts["decode"])
        loop = programs.loop(config, model, layouts, _load(config, asked))
        loop = dataclasses.replace(loop, schedule_updates=schedule.updates(config.rl))
        meshes = {phase: layout.mesh for phase, layout in layouts.items()}
        make = make or partial(make_plan, only=asked.programs, how=asked.how, say=say)
        made = make(shown, loop, topology, meshes)
    except Exception as error:  # a layout that cannot be should not cost what others have taken hours to give
        say(f"{shown}: {error}")
        return Plan(shown, failed=str(error) or repr(error), settings=settings)
    return dataclasses.replace(made, settings=settings)
