"""One layout: its programs compiled, their memory by kind beside what else lies there, their time, the whole loop's."""

import contextlib
import ctypes
import dataclasses
import gc
import math
import re
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax

from r1jax import hosts
from r1jax.plan import estimate
from r1jax.plan.programs import Load, Loop, Program, Tree, device_bytes, host_bytes
from r1jax.plan.topology import Topology

# What shrinks each kind of memory, by the key of the config.
REMEDIES = {
    "parameters": "spread them further: larger mesh.fsdp or mesh.expert",
    "optimizer": "spread it further: larger mesh.fsdp or mesh.expert",
    "reference": "spread it further (larger mesh.fsdp or mesh.expert), or grpo.kl_coef=0, which needs none",
    "frozen": "spread them further: larger mesh.fsdp or mesh.tensor",
    "weights": "spread the decoding weights further: larger decode_mesh.tensor or decode_mesh.expert",
    "cache": "fewer sampler.slots, a shorter rl.max_completion_tokens, or a larger decode_mesh.data, .fsdp or .expert",
    "gradients": "spread them further: larger mesh.fsdp or mesh.expert",
    "batch": "fewer rl.minibatches or prompts_per_update, larger mesh.context, or rl.router_replay=False",
    "activations": "lower rl.microbatch_rows, model.remat=attention or full, larger mesh.context or .tensor; in "
    "sampling, fewer sampler.prefill_prompts or sampler.slots",
}
# What may lie in host memory instead.
TO_HOST = {"optimizer": "optim.moments_on=host", "reference": "rl.reference_on=host"}


@dataclasses.dataclass(frozen=True)
class How:
    """Options of the compiler by name, and a folder for the programs' text, empty: none."""

    options: tuple[tuple[str, str], ...] = ()
    texts: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """A program of a layout, as planned.

    Attributes:
        hbm: bytes on a device by kind at its peak, with what lies beside it.
        host: bytes that a device has in its host's memory, by kind.
        failed: what the compiler said instead, if it did not take the program, or why there is no estimate.
        flops: of the model in one call, over all devices.
    """

    layout: str
    program: str
    calls: float
    trips: int
    tokens: float
    flops: float
    compile_s: float
    hbm: dict[str, float]
    host: dict[str, float]
    fits: bool
    cost: estimate.Cost | None
    mfu: float
    failed: str = ""

    @property
    def hbm_total(self) -> float:
        """Bytes on a device."""
        return sum(self.hbm.values())

    @property
    def est_s(self) -> float:
        """Seconds of one call."""
        return self.cost.seconds if self.cost else float("nan")


@dataclasses.dataclass(frozen=True)
class Plan:
    """All rows of a layout, and the loop's own figures where every program was priced.

    Attributes:
        rollout_s, updates_s: of a rollout, and of scoring it and all updates by it.
        tokens_per_s: of completions, over the whole loop.
        run_hours: of `run_updates` updates.
        updates: by a rollout.
        run_updates: of the run, as many as have completions of at most `longest` tokens.
        load: that was assumed.
        failed: why the layout has no rows.
        skipped: why not all of it was compiled, where a search chose so.
        least_s: of decoding a rollout; known without a compiler.
        settings: that were changed for this layout.
    """

    layout: str
    rows: tuple[Row, ...] = ()
    rollout_s: float = math.nan
    updates_s: float = math.nan
    tokens_per_s: float = math.nan
    run_hours: float = math.nan
    updates: int = 1
    run_updates: int = 0
    longest: int = 0
    load: Load | None = None
    failed: str = ""
    settings: str = ""
    skipped: str = ""
    least_s: float = math.nan

    @property
    def fits(self) -> bool:
        return not self.failed and all(row.fits for row in self.rows)

    @property
    def update_s(self) -> float:
        """Seconds of the whole loop for each update."""
        return (self.rollout_s + self.updates_s) / self.updates


def _on_host(program: Program) -> dict[str, float]:
    """Bytes that a device has in its host's memory, by kind."""
    trees = (*program.takes.items(), *program.beside.items())
    return {kind: size for kind, tree in trees if (size := host_bytes(tree))}


def _sizes(*groups: dict[str, Tree]) -> dict[str, float]:
    """Bytes on a device by kind, of several groups together."""
    out: dict[str, float] = {}
    for kind, tree in (item for group in groups for item in group.items()):
        out[kind] = out.get(kind, 0.0) + device_bytes(tree)
    return out


def _kinds(program: Program, compiled: Any) -> dict[str, float]:
    """Bytes on a device by kind, at the program's peak."""
    spent = compiled.memory_analysis()
    # The compiler's peak has what lies in host memory in it.
    beyond = spent.host_argument_size_in_bytes + spent.host_output_size_in_bytes - spent.host_alias_size_in_bytes
    peak = spent.peak_memory_in_bytes - beyond - spent.host_temp_size_in_bytes
    taken = sum(_sizes(program.takes, program.gives).values())
    return _sizes(program.takes, program.beside, program.gives) | {"activations": max(peak - taken, 0.0)}


def _too_large(message: str, taken: float) -> float:
    """Bytes that the compiler says a program needs beyond its arguments (`taken`), 0 if it failed of anything else."""
    whole = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
    alone = re.search(r"required for HLO temporaries \(([\d.]+)([KMGT])\) exceeds", message)
    if not (found := whole or alone):
        return 0.0
    return max(float(found[1]) * 1024 ** " KMGT".index(found[2]) - (taken if whole else 0.0), 1.0)


def _common(layout: str, program: Program) -> dict[str, Any]:
    """What a row has without a compiler."""
    return {
        "layout": layout,
        "program": program.name,
        "calls": program.calls,
        "trips": program.trips,
        "tokens": program.tokens,
        "flops": program.flops,
        "host": _on_host(program),
    }


def bound(layout: str, loop: Loop, topology: Topology) -> Plan:
    """What is known of a layout without a compiler: `least_s`, and where arguments and what lies beside them do not
    fit, the program that needs most.

    Decoding takes at least as long as memory takes to read every weight and all caches at each step.
    """
    reading = sum(
        p.calls * p.trips * sum(_sizes(p.takes).values()) for p in loop.programs if p.name.startswith("generate")
    )
    least_s = reading / topology.chip.hbm_bandwidth
    held = {p.name: _sizes(p.takes, p.beside) for p in loop.programs}
    worst = max(loop.programs, key=lambda p: sum(held[p.name].values()))
    if sum(held[worst.name].values()) <= topology.chip.hbm:
        return Plan(layout, skipped="nothing was compiled", least_s=least_s)
    said = "not compiled: its arguments and what lies beside them alone do not fit"
    row = Row(
        **_common(layout, worst), compile_s=0.0, hbm=held[worst.name], fits=False, cost=None, mfu=0.0, failed=said
    )
    return Plan(layout, (row,), skipped=f"{worst.name} was {said}", least_s=least_s)


def make_row(
    layout: str, program: Program, topology: Topology, mesh: jax.sharding.Mesh, done: dict[str, Any], how: How
) -> Row:
    """Compiles a program and prices it; `done` collects how what is compiled lays out its results."""
    started = time.monotonic()
    common = _common(layout, program)
    try:
        compiled = program.lower(done).compile(compiler_options=dict(how.options))
        done[program.name] = compiled.output_shardings  # not the program: all of a pod's together take gigabytes
    except Exception as error:  # whatever jax, XLA and Mosaic raise: the other programs are planned
        activations = _too_large(str(error), sum(_sizes(program.takes).values()))
        hbm = _sizes(program.takes, program.beside) | {"activations": activations}
        spent = time.monotonic() - started
        return Row(**common, compile_s=spent, hbm=hbm, fits=False, cost=None, mfu=0.0, failed=_first_line(error))
    compile_s = time.monotonic() - started
    text = compiled.as_text()
    if how.texts:
        hosts.atomic_write(f"{how.texts}/{layout.replace('/', '_')}.{program.name}.txt", text)
    cost, mfu, failed = _priced(text, program, topology, mesh)
    hbm = _kinds(program, compiled)
    fits = sum(hbm.values()) <= topology.chip.hbm
    return Row(**common, compile_s=compile_s, hbm=hbm, fits=fits, cost=cost, mfu=mfu, failed=failed)


def _priced(
    text: str, program: Program, topology: Topology, mesh: jax.sharding.Mesh
) -> tuple[estimate.Cost | None, float, str]:
    """Cost and MFU, or why there are none."""
    try:
        cost = estimate.cost(text, topology, mesh, program.trips, program.shares)
    except Exception as error:  # the text is no interface
        return None, 0.0, f"no estimate: {type(error).__name__} {_first_line(error)}"
    # Which of it the schedule would hide is not known: here, none.
    cost.host_s = program.hauled / topology.chip.pcie
    cost.seconds += cost.host_s
    mfu = program.flops / (cost.seconds * topology.chip.peak * mesh.size) if cost.seconds else 0.0
    if mfu >= 1:
        return None, 0.0, f"no estimate: it came to {mfu:.0%} of the peak, so it is wrong"
    return cost, mfu, ""


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [repr(error)]
    return next((line for line in lines if "hbm" in line.lower()), lines[0]).strip()


def _give_back() -> None:
    """Memory of the last compilation, which is gigabytes for a pod's program, to the system."""
    jax.clear_caches()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def make_plan(
    layout: str,
    loop: Loop,
    topology: Topology,
    meshes: dict[str, jax.sharding.Mesh],
    only: Collection[str],
    how: How,
    say: Callable[[str], None],
    known: Sequence[Row] = (),
) -> Plan:
    """Compiles and prices the programs of a loop, those named in `only` if any are, but for the rows `known`."""
    rows, done, known = [], {}, {row.program: row for row in known}
    for program in loop.programs:
        if only and program.name not in only:
            continue
        if program.name in known:
            rows.append(known[program.name])
            continue
        if program.name == "insert" and "prefill" not in done:
            continue  # it takes what prefill gives, as the compiler lays it out
        mesh = meshes["train" if program.name in ("score", "update") else "decode"]
        rows.append(make_row(layout, program, topology, mesh, done, how))
        _give_back()
        say(f"{layout} {program.name}: compiled in {rows[-1].compile_s:.0f} s")
    spent = {row.program: row.calls * row.est_s for row in rows}
    updates_s = sum(s for name, s in spent.items() if name in ("score", "update"))
    rollout_s = sum(s for name, s in spent.items() if name not in ("score", "update"))
    whole = rollout_s + updates_s
    is_whole = len(rows) == len(loop.programs)
    return Plan(
        layout,
        tuple(rows),
        rollout_s,
        updates_s,
        loop.completions * loop.load.completion_tokens / whole if is_whole and whole else float("nan"),
        whole * loop.schedule_updates / loop.updates / 3600 if is_whole else float("nan"),
        loop.updates,
        loop.schedule_updates,
        loop.longest,
        loop.load,
    )


def remedy(row: Row, hbm: float) -> str:
    """Which program does not fit, by how much, and what to change; or why it could not be compiled."""
    if row.failed and row.hbm_total <= hbm:
        return f"{row.layout}: {row.program} does not compile: {row.failed}"
    largest = sorted(row.hbm, key=row.hbm.get, reverse=True)[:2]
    movable = [
        f"{kind} {row.hbm[kind] / 1e9:.1f} GB ({key})"
        for kind, key in TO_HOST.items()
        if row.hbm.get(kind) and kind not in row.host
    ]
    over = (row.hbm_total - hbm) / 1e9
    parts = "; ".join(f"{kind} {row.hbm[kind] / 1e9:.1f} GB: {REMEDIES[kind]}" for kind in largest)
    return (
        f"{row.layout}: {row.program} needs {row.hbm_total / 1e9:.1f} GB a device, {over:.1f} GB more than the "
        f"{hbm / 1e9:.1f} GB there are. {parts}{'; to host memory could go: ' if movable else ''}{', '.join(movable)}"
    )
