"""The mesh, the logical axes, one rule table per phase, and resharding between phases.

Model code names logical axes; only this file and the configs know mesh axes. The idea is T5X's logical rules.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from r1jax import placement
from r1jax.types import Params

AXES = ("data", "fsdp", "expert", "context", "tensor")

Rules = Mapping[str, tuple[str, ...]]

# Training: rows lie over everything that is not context or tensor, and so do weights, but for the experts: of those
# every device but the ones along data and fsdp has its own. Between layers tokens are split over tensor as well
# (arXiv 2205.05198), which is also how they go to the experts; a shared expert is too narrow to be split.
TRAIN: Rules = {
    "rows": ("data", "fsdp", "expert"),
    "tokens": ("context",),
    "residual": ("context", "tensor"),
    "width": ("fsdp", "expert"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "shared_mlp": (),
    "experts": ("expert", "context", "tensor"),
    "expert_width": ("fsdp",),
    "vocab": ("tensor",),
}

# Decoding: every step reads every weight, so none is gathered. Slots lie as rows do in training, and over context as
# well, since a step has but one token of each. Latent caches, which have no heads to split, and the experts take each
# device's own share of the slots.
DECODE: Rules = {
    **TRAIN,
    "rows": ("data", "fsdp", "expert", "context"),
    "slots": ("data", "fsdp", "expert", "context", "tensor"),
    "tokens": (),
    "residual": ("tensor",),
    "width": (),
    "shared_mlp": ("tensor",),
    "expert_width": (),
}

PHASES = {"train": TRAIN, "decode": DECODE}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the rule table of one phase."""

    mesh: Mesh
    rules: Rules = dataclasses.field(hash=False)

    def spec(self, axes: tuple[str | None, ...]) -> PartitionSpec:
        """Mesh axes for the given logical axes; axes of size one are left out."""
        names = (tuple(a for a in self.rules.get(axis or "", ()) if self.mesh.shape[a] > 1) for axis in axes)
        return PartitionSpec(*((n if len(n) > 1 else n[0]) if n else None for n in names))

    def sharding(self, *axes: str | None) -> NamedSharding:
        """The sharding of an array with these logical axes; no axes means replicated."""
        return NamedSharding(self.mesh, self.spec(axes))

    def size(self, axis: str) -> int:
        """Over how many devices a logical axis is spread."""
        return int(np.prod([self.mesh.shape[a] for a in self.rules.get(axis, ())], dtype=int))

    @property
    def platform(self) -> str:
        """Of the mesh's devices: tpu, gpu, cpu."""
        return self.mesh.devices.flat[0].platform

    def mesh_axes(self, axis: str) -> tuple[str, ...]:
        """The mesh axes of more than one device behind a logical axis."""
        return tuple(a for a in self.rules.get(axis, ()) if self.mesh.shape[a] > 1)


def make_mesh(sizes: Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices; at most one size may be -1, which takes the devices that are left.

    Raises:
        ValueError: unknown axis, or sizes that do not multiply to the number of devices (config.mesh.*).
    """
    devices = jax.devices() if devices is None else devices
    if unknown := set(sizes) - set(AXES):
        raise ValueError(f"config.mesh has unknown axes {sorted(unknown)}; the axes are {', '.join(AXES)}")
    shape = {axis: int(sizes.get(axis, 1)) for axis in AXES}
    free = [axis for axis, n in shape.items() if n == -1]
    fixed = int(np.prod([n for n in shape.values() if n != -1]))
    if len(free) > 1 or any(n < 1 and n != -1 for n in shape.values()):
        raise ValueError(f"config.mesh sizes must be positive with at most one -1, got {shape}")
    if free and len(devices) % fixed == 0:
        shape[free[0]] = len(devices) // fixed
    if int(np.prod(list(shape.values()))) != len(devices):
        raise ValueError(
            f"config.mesh {shape} does not multiply to the {len(devices)} devices at hand; change config.mesh.*"
        )
    return _mesh(_placed(tuple(shape.values()), devices))


def _mesh(devices: np.ndarray) -> Mesh:
    return Mesh(devices, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def _placed(shape: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    """Devices so ordered that neighbours on a mesh axis are neighbours on the interconnect, where that is known."""
    if devices[0].platform == "tpu":
        return placement.over_slices(shape, devices, len(TRAIN["experts"]))
    return np.array(devices).reshape(shape)


def layouts(mesh: Mesh, decode: Mapping[str, int] | None = None) -> dict[str, Layout]:
    """The layouts of all phases over one mesh, or with other sizes of the axes for decoding (0 everywhere: the same).

    Raises:
        ValueError: sizes that do not multiply to the mesh's devices, or more than `data` across slices
            (config.decode_mesh.*).
    """
    other = {axis: int(n) for axis, n in (decode or {}).items() if n}
    if not other:
        return {phase: Layout(mesh, rules) for phase, rules in PHASES.items()}
    shape = tuple(other.get(axis, 1) for axis in AXES)
    if min(shape) < 1 or int(np.prod(shape)) != mesh.size:
        sizes = dict(zip(AXES, shape, strict=True))
        raise ValueError(f"config.decode_mesh {sizes} does not multiply to the {mesh.size} devices of config.mesh")
    slices = len({getattr(d, "slice_index", 0) for d in mesh.devices.flat})
    if shape[0] % slices:
        raise ValueError(
            f"config.decode_mesh.{AXES[0]} is {shape[0]}, but only the axis {AXES[0]} may lie across slices, and there "
            f"are {slices}; make config.decode_mesh.{AXES[0]} a multiple of {slices}"
        )
    # The same devices in the same order: so weights go from one mesh to the other within a program.
    meshes = {"train": mesh, "decode": _mesh(mesh.devices.reshape(shape))}
    return {phase: Layout(meshes[phase], rules) for phase, rules in PHASES.items()}


_current: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def use(layout: Layout | None) -> Iterator[None]:
    """Within this context (entered inside the traced function) `constrain` and `current` follow the layout."""
    token = _current.set(layout)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Layout | None:
    """The layout in force, or None on a single device."""
    layout = _current.get()
    return layout if layout is not None and layout.mesh.size > 1 else None


def platform() -> str:
    """What the computation is traced for: the mesh in force decides, else what jax finds."""
    layout = _current.get()
    return jax.default_backend() if layout is None else layout.platform


def device_kind() -> str:
    """Of what is computed for, in the maker's words: "TPU v5 lite" is a v5e, "TPU v5" a v5p."""
    layout = _current.get()
    return (jax.devices() if layout is None else layout.mesh.devices.flat)[0].device_kind


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """States how an activation lies on the mesh; the identity on one device."""
    layout = current()
    return x if layout is None else jax.lax.with_sharding_constraint(x, layout.sharding(*axes))


def tree_shardings(axes: Params, layout: Layout) -> Params:
    """Shardings for a tree of logical axes (tuples of names as leaves)."""
    return jax.tree.map(lambda a: layout.sharding(*a), axes, is_leaf=lambda a: isinstance(a, tuple))


def check_divides(axes: Params, shapes: Params, layout: Layout) -> None:
    """Raises ValueError where a weight's dimension does not divide by the devices it is spread over (config.mesh.*)."""

    def one(path: tuple, names: tuple, leaf: jax.ShapeDtypeStruct) -> None:
        for name, n in zip(names, leaf.shape, strict=True):
            parts = layout.size(name) if name else 1
            if n % parts:
                where = jax.tree_util.keystr(path, simple=True, separator=".")
                raise ValueError(
                    f"{where}: {name} of {n} does not divide over {parts} devices; "
                    f"change config.mesh.{' or config.mesh.'.join(layout.mesh_axes(name))}"
                )

    jax.tree_util.tree_map_with_path(one, axes, shapes, is_leaf=lambda a: isinstance(a, tuple))


# Where arrays lie between their uses, by the config's name of it: the device's own memory, or that of its host from
# which the device itself reads.
MEMORIES = {"device": None, "host": "pinned_host"}


def in_memory(shardings: Params, memory: str, key: str) -> Params:
    """The same shardings in one of MEMORIES, which `key` of the config names.

    Raises:
        ValueError: these devices have no such memory.
    """
    if (kind := MEMORIES[memory]) is None:
        return shardings
    try:
        return jax.tree.map(lambda s: s.with_memory_kind(kind), shardings)
    except ValueError as error:  # jax lists the memories that there are
        raise ValueError(f"config.{key} is {memory!r}, which these devices do not have: {error}") from error


def memory(sharding: jax.sharding.Sharding) -> str:
    """Which of MEMORIES it names."""
    return "host" if sharding.memory_kind == MEMORIES["host"] else "device"


def laid_out(tree: Params, shardings: Params) -> Params:
    """Shapes with shardings, of arrays or shapes."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings)


def reshard(tree: Params, shardings: Params) -> Params:
    """The same values laid out anew, device to device."""
    return jax.device_put(tree, shardings)
