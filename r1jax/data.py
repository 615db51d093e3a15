"""Where prompts come from, and in which order: any source by its name, any place in it by one integer.

The order is a pure function of (seed, epoch), so a run that resumes needs nothing but its cursor; the idea is Grain's.
"""

import dataclasses
import functools

import numpy as np

from r1jax import countdown, sources
from r1jax.types import Example


@dataclasses.dataclass(frozen=True)
class Source:
    """Prompts in a fixed order, and the name under which logs and errors speak of them."""

    name: str
    examples: tuple[Example, ...]


@dataclasses.dataclass(frozen=True)
class PromptStream:
    """A source without end: epoch after epoch, each in an order of its own when `shuffle` is set."""

    source: Source
    seed: int
    shuffle: bool = True

    def take(self, cursor: int, n: int) -> list[Example]:
        """The `n` examples from position `cursor` (at least 0) on; the same for the same arguments, always."""
        size = len(self.source.examples)
        taken = []
        for position in range(cursor, cursor + n):
            epoch, place = divmod(position, size)
            taken.append(self.source.examples[order(size, self.seed, epoch)[place] if self.shuffle else place])
        return taken


@functools.lru_cache(maxsize=8)
def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """A random permutation [n] int64 of 0..n-1, read-only, drawn from (seed, epoch) alone (both at least 0).

    Sorts raw generator output, which numpy promises never to change, unlike that of `Generator.permutation`.
    """
    permutation = np.argsort(np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(n), kind="stable")
    permutation.flags.writeable = False
    return permutation


def open_source(spec: str, split: str, columns: sources.Columns, size: int = 2000, seed: int = 0) -> Source:
    """The source that `spec` (config.data.source) names.

    Args:
        spec: "countdown", "PATH.jsonl" or "PATH.jsonl.gz", "tfds:NAME", "reasoning_gym:FAMILY".
        split: a part of the source; a JSONL file is one split, whatever this says.
        columns: what to read from a JSONL file or TensorFlow dataset.
        size: how many problems reasoning-gym generates for all splits together, before repeated ones are dropped.
        seed: of reasoning-gym's generator.

    Raises:
        ValueError: no such source, split or column; a corrupt, missing or empty one.
    """
    kind, _, name = spec.partition(":")
    if spec == "countdown":
        examples = countdown.problems(split)
    elif spec.endswith((".jsonl", ".jsonl.gz")):
        examples = sources.read_jsonl(spec, columns)
    elif kind == "tfds" and name:
        examples = sources.read_tfds(name, split, columns)
    elif kind == "reasoning_gym" and name:
        examples = sources.generate_reasoning_gym(name, split, size, seed)
    else:
        raise ValueError(
            f"config.data.source is {spec!r}; it must be 'countdown', a path that ends in .jsonl or .jsonl.gz, "
            "'tfds:NAME' or 'reasoning_gym:FAMILY'"
        )
    if not examples:
        raise ValueError(f"config.data.source {spec!r} has no examples in split {split!r}")
    return Source(name=spec, examples=tuple(examples))
