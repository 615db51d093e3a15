"""Layouts by name: fsdp4-expert32-tensor8; with another mesh for decoding, fsdp4-expert32-tensor8/data4-expert256."""

import difflib
import math
import re

from r1jax.sharding import AXES

Sizes = dict[str, int]


def parse(name: str, devices: int) -> tuple[Sizes, Sizes]:
    """Sizes of the mesh axes in training and in decoding.

    Raises:
        ValueError: an unknown axis, or sizes that do not multiply to the devices.
    """
    parts = name.split("/")
    if len(parts) > 2:
        raise ValueError(f"--layouts={name}: wanted TRAIN or TRAIN/DECODE")
    sizes = [_sizes(part, name, devices) for part in parts]
    return sizes[0], sizes[-1]


def _sizes(part: str, name: str, devices: int) -> Sizes:
    out: Sizes = {}
    for word in part.split("-"):
        found = re.fullmatch(r"([a-z]+)(\d+)", word)
        if not found or found[1] not in AXES or found[1] in out or int(found[2]) < 1:
            near = difflib.get_close_matches(word.rstrip("0123456789"), AXES, 1)
            hint = f"; did you mean {near[0]}?" if near and (not found or found[1] not in AXES) else "."
            raise ValueError(
                f"--layouts={name}: {word!r} is no axis with its size{hint} Wanted some of {', '.join(AXES)}, "
                "each once, as in fsdp4-expert32-tensor8"
            )
        out[found[1]] = int(found[2])
    if math.prod(out.values()) != devices:
        raise ValueError(
            f"--layouts={name}: {' x '.join(map(str, out.values()))} is {math.prod(out.values())}, "
            f"but the topology has {devices} devices"
        )
    return out


def spell(sizes: Sizes) -> str:
    """The name of a layout; axes of one device are left out."""
    return "-".join(f"{axis}{sizes[axis]}" for axis in AXES if sizes.get(axis, 1) > 1) or "data1"
