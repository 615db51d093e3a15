"""Reads the scheduled program that the TPU compiler writes as text: instructions, their cycles, loops, collectives.

The text is no interface, so only what was seen in it is relied on: an instruction starts with its name and " = ",
an estimate stands in its backend_config as "estimated_cycles", a loop's trip count in its own or in its condition.
"""

import dataclasses
import json
import math
import re

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
# Between slices nothing is a collective: the host sends an array and receives what became of it.
TO_HOSTS = ("send", "recv")
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "f64": 8, "c64": 8}

_START = re.compile(r"^\s*(ROOT )?%?([\w.\-]+)\s+= ")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+\w*|c64)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `shape = opcode(operands), rest`."""

    name: str
    shape: str
    opcode: str
    operands: str
    rest: str

    @property
    def cycles(self) -> float:
        """The compiler's own estimate, zero where it gives none."""
        found = re.search(r'"estimated_cycles":"?(\d+)', self.rest)
        return float(found[1]) if found else 0.0

    def called(self, key: str) -> list[str]:
        """Names of the computations behind calls=, body=, condition=, branch_computations=."""
        found = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.rest)
        return re.findall(r"[\w.\-]+", found[1].replace("%", "")) if found else []

    @property
    def meeting(self) -> str:
        """Of a transfer between slices: what its send and its recv have in common, empty for anything else."""
        if self.opcode not in TO_HOSTS or '_xla_host_transfer_handler_name="xla_megascale_runtime"' not in self.rest:
            return ""
        return re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', self.rest)[1]

    @property
    def arguments(self) -> list[str]:
        """Names of the instructions that it reads."""
        return re.findall(r"%([\w.\-]+)", self.operands)


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations by name, instructions in the order in which they run."""

    computations: dict[str, list[Instruction]]
    entry: str


def shape_bytes(text: str) -> list[float]:
    """Bytes of every array that a type mentions."""
    out = []
    for kind, dims in _SHAPE.findall(text):
        width = BYTES.get(kind) or int(re.sub(r"\D.*", "", kind[1:])) / 8
        out.append(width * math.prod(int(n) for n in dims.split(",") if n))
    return out


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for at in range(start, len(text)):
        depth += text[at] in "([{"
        depth -= text[at] in ")]}"
        if depth == 0:
            return at
    raise ValueError(f"a bracket does not close: {text[start : start + 80]!r}")


def _instruction(text: str) -> Instruction:
    found = _START.match(text)
    rest = text[found.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opened = rest.index("(")
    closed = _closing(rest, opened)
    return Instruction(found[2], shape, rest[:opened], rest[opened + 1 : closed], rest[closed + 1 :])


def parse(text: str) -> Module:
    """The computations of a program as `Compiled.as_text()` gives it."""
    computations: dict[str, list[Instruction]] = {}
    entry, current, pending = "", None, []

    def flush() -> None:
        if pending:
            computations[current].append(_instruction("\n".join(pending)))
            pending.clear()

    for line in text.splitlines():
        if current is None:
            if (found := _HEAD.match(line)) and not line.startswith("HloModule"):
                current = found[2]
                computations[current] = []
                entry = current if found[1] else entry
        elif line.startswith("}"):
            flush()
            current = None
        elif _START.match(line):
            flush()
            pending.append(line)
        elif pending:
            pending.append(line)  # strings in an instruction may hold line breaks
    return Module(computations, entry)


def _constant(instruction: Instruction) -> int | None:
    if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.operands.strip()):
        return int(instruction.operands)
    return None


def trips(module: Module, loop: Instruction) -> int | None:
    """How often a loop runs, None where the program computes that."""
    found = re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.rest)
    if found:
        return int(found[1])
    condition = module.computations[loop.called("condition")[0]]
    scope = {i.name: i for i in condition}
    compare = condition[-1]
    for i in condition:
        compare = i if i.opcode == "compare" else compare
    limits = [_constant(scope[name]) for name in compare.arguments if name in scope]
    limit = next((n for n in limits if n is not None), None)
    if compare.opcode != "compare" or limit is None or "direction=LT" not in compare.rest:
        return None
    step = _step(module.computations[loop.called("body")[0]], compare, scope)
    return None if step is None else -(-limit // step)


def _step(body: list[Instruction], compare: Instruction, scope: dict[str, Instruction]) -> int | None:
    """By how much the body raises the counter that the condition compares; None where that cannot be seen."""
    counter = next((scope[n] for n in compare.arguments if n in scope and _constant(scope[n]) is None), None)
    found = re.search(r"index=(\d+)", counter.rest) if counter else None
    if not found:
        return None
    local = {i.name: i for i in body}
    root = body[-1]
    results = root.arguments
    if root.opcode != "tuple" or int(found[1]) >= len(results):
        return None

    def behind_copies(name: str) -> Instruction | None:
        found = local.get(name)
        while found is not None and found.opcode in ("copy", "bitcast"):
            found = local.get(found.arguments[0])
        return found

    new = behind_copies(results[int(found[1])])
    if new is None or new.opcode != "add":
        return None
    addends = [behind_copies(name) for name in new.arguments]
    return next((n for n in (_constant(a) for a in addends if a) if n), None)


def groups(rest: str) -> list[list[int]]:
    """Which devices of the mesh, by their place in it, exchange data in a collective; none stands for all.

    Raises:
        ValueError: groups are written in a way that was never seen.
    """
    if found := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        return [[int(n) for n in pair.split(",")] for pair in re.findall(r"\{([\d,]+)", found[0])]
    if found := re.search(r"replica_groups=\{(\{.*?\})\}", rest):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        shape, flat = _ints(found[1]), _iota(found[2], found[3])
        return [flat[i : i + shape[-1]] for i in range(0, len(flat), shape[-1])]
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?) \{([^}]*)\}", rest):
        return _mesh_groups(*found.groups())
    if "replica_groups=" in rest and "replica_groups={}" not in rest:
        raise ValueError(f"groups of a collective that are not understood: {rest[:200]}")
    return []


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def _iota(dims: str, order: str | None) -> list[int]:
    """0, 1, 2, ... in an array of these dimensions, transposed, read in order."""
    sizes = _ints(dims)
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    flat = [0]
    for axis in _ints(order) if order else range(len(sizes)):
        flat = [base + i * strides[axis] for base in flat for i in range(sizes[axis])]
    return flat


def _mesh_groups(axes: str, devices: str, along: str) -> list[list[int]]:
    """Groups along some axes of a mesh, or along parts of them: 'a':(before)size."""
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", axes)}
    found = re.search(r"(?:<=|device_ids=\()\[([\d,]+)\](?:T\(([\d,]+)\))?", devices)
    flat = _iota(found[1], found[2]) if found else list(range(math.prod(sizes.values())))
    if devices.strip(" ,") and not found:
        raise ValueError(f"a mesh of devices that is not understood: {devices}")
    parts: list[tuple[str, int, bool]] = []  # of every axis: its name, size, whether groups extend along it
    taken = {
        name: (int(m or 1), int(n or sizes[name])) for name, m, n in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", along)
    }
    for name, size in sizes.items():
        before, inside = taken.get(name, (1, 1))
        parts += [(name, before, False), (name, inside, name in taken), (name, size // before // inside, False)]
    outside: list[list[int]] = [[]]
    for _, size, is_inside in parts:
        outside = [out if is_inside else [*out, i] for out in outside for i in range(size)]
    found_groups: dict[tuple[int, ...], list[int]] = {}
    for place, out in enumerate(outside):
        found_groups.setdefault(tuple(out), []).append(flat[place])
    return list(found_groups.values())


def kernel_cost(call: Instruction) -> tuple[float, float] | None:
    """Operations and bytes that a Pallas kernel says it takes (pl.CostEstimate), None where it says nothing."""
    found = re.search(r'"cost_estimate":(\{[^}]*\})', call.rest)
    if not found:
        return None
    cost = json.loads(found[1])
    return float(cost.get("flops", 0)), float(cost.get("bytes_accessed", 0))
