"""Which TPUs there are, what a chip of each can do, and how a described slice of them is opened for the compiler.

Peaks, memory and links: cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x); bandwidths of links and of memory as
"How to Scale Your Model" (jax-ml.github.io/scaling-book, chapter 2) has them, and of PCIe too (for tpu7x our choice).
Clocks are derived: the peak over what the matrix units do per cycle. `hbm` is what the compiler lets a program have.
`dcn` is *reported* there: 50 Gb/s a chip for v5p, 100 for v6e (25.6 Tb/s a pod of 256) and tpu7x, 25 for v5e (6.4 Tb/s
a pod); for v4, of which nothing is said, *our choice* is the least of them.
"""

import dataclasses
import importlib.util
import math
import os
import re

import jax

INSTALL = "pip install 'r1jax[tpu]'"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as jax counts them; of a TPU7x that is half a chip.

    Attributes:
        peak: bfloat16 operations a second.
        hbm: bytes a program may use.
        hbm_bandwidth: bytes a second.
        clock_hz: of the compiler's estimated cycles.
        link: bytes a second of one link of the interconnect, one way.
        dimensions: of the torus.
        wraps_at: a dimension of the slice closes to a ring if it is a multiple of this.
        dcn: bytes a second between slices, per device, one way.
        pcie: bytes a second between the device and its host's memory, one way.
    """

    peak: float
    hbm: float
    hbm_bandwidth: float
    clock_hz: float
    link: float
    dimensions: int
    wraps_at: int
    dcn: float
    pcie: float = 1.5e10
    per_chip: int = 1


# What a host of a pod runs with: launch/env.sh sets the same, and a test holds the two together.
FLAGS = (
    "xla_tpu_enable_async_collective_fusion",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
    "xla_tpu_enable_async_collective_fusion_multiple_steps",
    "xla_tpu_overlap_compute_collective_tc",
    "xla_enable_async_all_gather",
    "xla_tpu_enable_data_parallel_all_reduce_opt",
    "xla_tpu_data_parallel_opt_different_sized_ops",
)
# With it the compiler takes no exchange for v5e, a torus of two dimensions.
FLAGS_3D = (*FLAGS, "xla_tpu_enable_async_all_to_all")

GIB = 2**30
CHIPS = {
    "v4": Chip(275e12, 30.75 * GIB, 1.23e12, 1.05e9, 4.5e10, 3, 4, 3.1e9),
    "v5e": Chip(197e12, 15.75 * GIB, 8.1e11, 1.503e9, 4.5e10, 2, 16, 3.1e9),
    "v5p": Chip(459e12, 95e9, 2.76e12, 1.751e9, 9e10, 3, 4, 6.25e9),
    "v6e": Chip(918e12, 31.25 * GIB, 1.64e12, 1.751e9, 9e10, 2, 16, 12.5e9, pcie=3.2e10),
    "tpu7x": Chip(1153e12, 94.75 * GIB, 3.69e12, 2.2e9, 9e10, 3, 4, 6.25e9, per_chip=2),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A described slice, or several alike joined by the data centre's network."""

    name: str
    chip: Chip
    shape: tuple[int, ...]  # chips along each dimension of a slice
    slices: int
    devices: tuple[jax.Device, ...]

    @property
    def chips(self) -> int:
        """Chips, not devices, of all slices."""
        return math.prod(self.shape) * self.slices

    def wraps(self, dimension: int) -> bool:
        """Whether links close this dimension to a ring."""
        n = self.shape[dimension] if dimension < len(self.shape) else 1
        # A three-dimensional torus has its switches at the faces of whole cubes of 4 x 4 x 4.
        whole = all(m % 4 == 0 for m in self.shape) if self.chip.dimensions == 3 else True
        return whole and n % self.chip.wraps_at == 0


def parse(name: str) -> tuple[str, tuple[int, ...], int]:
    """Kind, shape and number of slices of a name such as v5p:8x8x16 or 2*v5e:16x16.

    Raises:
        ValueError: no such kind of TPU, or a shape of other dimensions than its torus has.
    """
    known = ", ".join(f"{kind}:{'x'.join('ABC'[: chip.dimensions])}" for kind, chip in CHIPS.items())
    found = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", name)
    if not found or found[2] not in CHIPS:
        raise ValueError(f"--topology={name}: wanted one of {known}; N*v5e:16x16 for N slices")
    shape = tuple(int(n) for n in found[3].split("x"))
    if len(shape) != CHIPS[found[2]].dimensions or 0 in shape:
        raise ValueError(
            f"--topology={name}: {found[2]} is a torus of {CHIPS[found[2]].dimensions} dimensions ({known})"
        )
    return found[2], shape, int(found[1] or 1)


def options(name: str) -> tuple[tuple[str, str], ...]:
    """Options of the compiler as a run on this topology has them; none where libtpu reads them from LIBTPU_INIT_ARGS.

    Raises:
        ValueError: as `parse`.
    """
    kind, _, _ = parse(name)
    if os.environ.get("LIBTPU_INIT_ARGS"):
        return ()
    return tuple((flag, "true") for flag in (FLAGS_3D if CHIPS[kind].dimensions == 3 else FLAGS))


def open_topology(name: str) -> Topology:
    """Describes a slice to the TPU compiler that libtpu brings; no TPU is needed.

    Raises:
        ValueError: no such topology, or libtpu is not installed.
    """
    kind, shape, slices = parse(name)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"libtpu is not installed, and with it the compiler for TPUs: {INSTALL}")
    # Else libtpu asks the cloud's metadata server which machine this is, and wants to be alone on it.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    spelled = f"{kind}:{'x'.join(map(str, shape))}"
    options = {} if slices == 1 else {"num_slices": slices}
    # A chip on its own is no slice of a host with four or eight: the bounds of the host are named.
    if math.prod(shape) == 1:
        options |= {"chips_per_host_bounds": (1, 1, 1), "num_slices": slices}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=spelled, **options)
    except Exception as error:  # whatever jax raises for what libtpu refuses
        raise ValueError(
            f"--topology={name}: the compiler knows no such slice ({str(error).splitlines()[0]})"
        ) from error
    return Topology(name, CHIPS[kind], shape, slices, tuple(found.devices))
