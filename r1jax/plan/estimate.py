"""The time of a compiled program: its schedule played through, compute against interconnect. Everything is an estimate.

Compute is the compiler's own estimate of cycles. A collective that runs beside compute (a start, and a done later)
costs only what is left of it when its result is wanted; all of them share one interconnect, and those between slices
the data centre's network. A kernel, for which the
compiler has no estimate, is taken at a share of the peaks: our own at what its schedule gives.
"""

import dataclasses
import re
import types
from collections.abc import Mapping
from typing import NamedTuple

import jax

from r1jax.model.experts import FURTHER_ROUNDS
from r1jax.plan import hlo, interconnect
from r1jax.plan.topology import Topology

KERNEL_MEMORY = 0.8  # of the memory's bandwidth: our round number
KERNEL_COMPUTE = 0.5  # of the bfloat16 peak, where no schedule was counted: our round number


class Kernel(NamedTuple):
    """A kernel by its name in the program's text.

    Attributes:
        share: in the `shares` of a program, of the work that it is compiled for, what it has to do.
        reads_all: whatever its share of the operations, it moves all bytes, as the experts' weights.
        compute: of the peak; counted bundles of the compiler's schedule for v5p (python -m tests.bench.kernels).
    """

    name: str
    share: str
    compute: float
    reads_all: bool = False


# Their grids depend on the data: attention over packed rows skips pairs of blocks that read nothing of each other
# (model/kernels/flash.py), a grouped product the rows that are only room for an uneven share.
KERNELS = (
    Kernel("/forward_kernel/", "attention", 0.53),
    Kernel("/queries_kernel/", "attention", 0.68),
    Kernel("/keys_kernel/", "attention", 0.73),
    Kernel("/mla_decode/", "", 0.80),
    Kernel("ragged-dot-", "grouped", KERNEL_COMPUTE, reads_all=True),
    # jit(gmm), jit(tgmm): 90% and more of a step, but the last of an odd number of tiles leaves a core idle.
    Kernel("gmm)", "grouped", 0.8, reads_all=True),
)
OTHER = Kernel("", "", KERNEL_COMPUTE)


Shares = Mapping[str, float]
NONE: Shares = types.MappingProxyType({})

Wire = tuple[str, str, float, float]  # kind of a collective, mesh axes, bytes, seconds


@dataclasses.dataclass
class Cost:
    """Of one run through a computation, on one device.

    Attributes:
        seconds: with the overlap that the schedule has.
        compute_s, wire_s, kernel_s: each on its own.
        moved: bytes by kind of collective and mesh axes.
        wire: seconds likewise.
        host_s: of what moves between the device and its host's memory, in `seconds` as if nothing ran beside it.
        unpriced: kernels without an estimate, left out.
        open_loops: loops of unknown length, taken once.
    """

    seconds: float = 0.0
    compute_s: float = 0.0
    wire_s: float = 0.0
    kernel_s: float = 0.0
    host_s: float = 0.0
    moved: dict[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    wire: dict[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    unpriced: int = 0
    open_loops: int = 0

    def add(self, other: "Cost", times: float = 1) -> None:
        """Everything but `seconds`, which the caller places on its own clock."""
        self.compute_s += times * other.compute_s
        self.wire_s += times * other.wire_s
        self.kernel_s += times * other.kernel_s
        for mine, theirs in ((self.moved, other.moved), (self.wire, other.wire)):
            for key, value in theirs.items():
                mine[key] = mine.get(key, 0.0) + times * value
        self.unpriced += other.unpriced
        self.open_loops += other.open_loops


def cost(text: str, topology: Topology, mesh: jax.sharding.Mesh, open_trips: int, shares: Shares = NONE) -> Cost:
    """The cost of a program.

    Args:
        text: as `Compiled.as_text()` gives it.
        mesh: over whose devices it was compiled, in their order.
        open_trips: of each outermost loop whose length only the data says.
        shares: of the work that a kind of kernel is compiled for, what it has to do: see KERNELS.
    """
    return _Player(hlo.parse(text), topology, mesh, open_trips, shares).entry()


class _Player:
    def __init__(
        self, module: hlo.Module, topology: Topology, mesh: jax.sharding.Mesh, open_trips: int, shares: Shares
    ) -> None:
        self.module, self.topology, self.mesh = module, topology, mesh
        self.open_trips, self.shares = open_trips, shares
        self.flat = list(mesh.devices.flat)
        self.shapes = {i.name: i.shape for lines in module.computations.values() for i in lines}
        self.known: dict[tuple[str, bool], Cost] = {}

    def entry(self) -> Cost:
        return self.play(self.module.entry, True)

    def play(self, name: str, is_outermost: bool) -> Cost:
        if (name, is_outermost) not in self.known:
            self.known[name, is_outermost] = self._play(name, is_outermost)
        return self.known[name, is_outermost]

    def _play(self, name: str, is_outermost: bool) -> Cost:
        out, clock, link_free, dcn_free = Cost(), 0.0, 0.0, 0.0
        ends: dict[str, float] = {}
        instructions = self.module.computations.get(name, [])
        met = {i.name: i.meeting for i in instructions if i.meeting}
        fused = [self._fused(i) for i in instructions]
        last = {key: at for at, found in enumerate(fused) for key in found}
        for at, i in enumerate(instructions):
            kind = i.opcode.removesuffix("-start")
            if i.opcode.endswith("-done") or i.opcode == "async-update":
                ended = max((ends.get(met.get(a, a), 0.0) for a in i.arguments), default=0.0)
                if i.opcode == "async-update":
                    ends[i.name] = ended
                else:
                    clock = max(clock, ended)
            elif i.name in met:
                if i.opcode == "send":
                    ends[i.meeting] = dcn_free = max(clock, dcn_free) + self._count(out, self._between_slices(i))
            elif kind in hlo.COLLECTIVES:
                link_free = max(clock, link_free) + self._count(out, self._wire(i, kind))
                if i.opcode == kind:
                    clock = link_free
                ends[i.name] = link_free
            elif fused[at]:
                # Fusions that compute while they communicate: a collective runs from the first that has it to the last.
                for key, wire in fused[at].items():
                    if key not in ends:
                        ends[key] = link_free = max(clock, link_free) + self._count(out, wire)
                work = i.cycles / self.topology.chip.clock_hz
                out.compute_s += work
                clock += work
                if i.opcode == "async-start":
                    ends[i.name] = max(ends[key] for key in fused[at])
                else:
                    clock = max([clock, *(ends[key] for key in fused[at] if last[key] == at)])
            elif i.opcode == "while":
                clock += self._loop(out, i, is_outermost)
            elif i.opcode in ("call", "conditional") or (i.opcode == "async-start" and i.called("calls")):
                inner = i.called("to_apply") + i.called("calls") + i.called("branch_computations")
                taken = max((self.play(n, is_outermost) for n in inner), key=lambda c: c.seconds, default=Cost())
                out.add(taken)
                clock += taken.seconds
            elif i.opcode == "custom-call" and "tpu_custom_call" in i.rest:
                clock += self._kernel(out, i)
            else:
                work = i.cycles / self.topology.chip.clock_hz
                out.compute_s += work
                clock += work
        out.seconds = max(clock, link_free, dcn_free)
        return out

    def _loop(self, out: Cost, loop: hlo.Instruction, is_outermost: bool) -> float:
        times = 0 if FURTHER_ROUNDS in loop.rest else hlo.trips(self.module, loop)
        is_open = times is None
        if is_open:
            times = self.open_trips if is_outermost else 1
            out.open_loops += not is_outermost
        body = self.play(loop.called("body")[0], is_outermost and not is_open)
        out.add(body, times)
        return times * body.seconds

    def _kernel(self, out: Cost, call: hlo.Instruction) -> float:
        if call.name.startswith("ragged-dot-metadata"):  # counts a few integers for the products after it
            return 0.0
        priced = hlo.kernel_cost(call)
        if priced is None:
            out.unpriced += 1
            return 0.0
        chip = self.topology.chip
        kernel = next((k for k in KERNELS if k.name in call.rest), OTHER)
        share = self.shares.get(kernel.share, 1.0)
        moves = priced[1] / (KERNEL_MEMORY * chip.hbm_bandwidth)
        took = max(share * priced[0] / (kernel.compute * chip.peak), moves if kernel.reads_all else share * moves)
        out.kernel_s += took
        return took

    def _fused(self, i: hlo.Instruction) -> dict[str, Wire]:
        """Collectives inside a fusion or an asynchronous call, by what tells them apart."""
        if i.opcode not in ("fusion", "async-start"):
            return {}
        inner = [j for name in i.called("calls") for j in self.module.computations.get(name, ())]
        # A reduce-scatter hides in a fusion as an all-reduce of which a slice is taken.
        slices = any(j.opcode == "dynamic-slice" for j in inner)
        out = {}
        for j in inner:
            kind = j.opcode.removesuffix("-start")
            if kind in hlo.COLLECTIVES:
                chain = re.search(r'chain_id="(\d+)"', j.rest)
                # The fusions of one chain repeat their collective.
                key = f"{kind} chain {chain[1]}" if chain else f"{i.name} {j.name}"
                out[key] = self._wire(j, "reduce-scatter" if slices and kind == "all-reduce" else kind)
        return out

    def _between_slices(self, i: hlo.Instruction) -> Wire:
        kind = re.match(r"[a-z\-]*", i.meeting)[0]  # all-reduce.1_0: named after the collective that it was
        size, slices = hlo.shape_bytes(i.shape)[0], self.topology.slices
        if kind == "all-gather":  # is given what each slice has
            size *= slices
        axis = self.mesh.axis_names[0]  # the one that slices lie along, see placement.over_slices
        return kind, axis, size, interconnect.dcn_seconds(self.topology, kind, size, slices)

    def _wire(self, i: hlo.Instruction, kind: str) -> Wire:
        members = hlo.groups(i.rest)
        if kind == "collective-permute":
            members = [pair for pair in members if pair[0] != pair[1]]
            if not members:  # every device keeps what it has; between slices there may be such
                return kind, "", 0.0, 0.0
        if not members:
            members = [list(range(len(self.flat) // self.topology.slices))]  # a program is one slice's
        # Of an asynchronous collective the type also names its handles, which do not travel.
        sizes = hlo.shape_bytes(re.sub(r"\bu32\[\]", "", i.shape) if i.opcode.endswith("-start") else i.shape)
        size = sum(sizes)
        if i.opcode.endswith("-start") and kind != "all-reduce":  # (operands, results[, ...])
            size = sum(sizes[: len(sizes) // 2]) if kind == "reduce-scatter" else sum(sizes[len(sizes) // 2 :])
            size = max(sizes) if kind == "collective-permute" or len(sizes) % 2 else size
        elif kind == "ragged-all-to-all":  # the longer side is room: there is nothing to send that the shorter has not
            size = min(size, sum(hlo.shape_bytes(self.shapes[i.arguments[0]])))
        elif kind == "reduce-scatter" and i.opcode == "reduce-scatter":
            size *= len(members[0])
        groups = [[self.flat[n] for n in group] for group in members]
        if kind == "collective-permute":
            took = interconnect.permute_seconds(self.topology, size, groups)
        else:
            took = interconnect.seconds(self.topology, kind, size, groups[0])
        return kind, interconnect.axes(self.mesh, members[0]), size, took

    @staticmethod
    def _count(out: Cost, wire: Wire) -> float:
        kind, axes, size, took = wire
        out.moved[kind, axes] = out.moved.get((kind, axes), 0.0) + size
        out.wire[kind, axes] = out.wire.get((kind, axes), 0.0) + took
        out.wire_s += took
        return took
