"""Where prompts come from, and in which order: any source by its name, any place in it by one integer.

The order is a pure function of (seed, epoch), so a run that resumes needs nothing but its cursor; the idea is Grain's.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np

from r1jax import countdown, letters, sources
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

    @property
    def examples(self) -> tuple[Example, ...]:
        """Everything that may come."""
        return self.source.examples


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A stream in which, from position `first` on, a share of the prompts is taken from another, general one.

    Attributes:
        is_on: whether general prompts still come, by the position that is asked for.
    """

    problems: PromptStream
    general: PromptStream
    first: int
    share: float
    is_on: Callable[[int], bool]

    def take(self, cursor: int, n: int) -> list[Example]:
        """As `PromptStream.take`."""
        taken, is_on = [], self.is_on(cursor)
        for position in range(cursor, cursor + n):
            k = position - self.first
            nth = math.floor((k + 1) * self.share)
            if is_on and k >= 0 and nth > math.floor(k * self.share):
                taken += self.general.take(nth - 1, 1)
            else:
                taken += self.problems.take(position, 1)
        return taken

    @property
    def examples(self) -> tuple[Example, ...]:
        """Everything that may come."""
        return self.problems.examples + self.general.examples


@functools.lru_cache(maxsize=8)
def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """A random permutation [n] int64 of 0..n-1, read-only, drawn from (seed, epoch) alone (both at least 0).

    Sorts raw generator output, which numpy promises never to change, unlike that of `Generator.permutation`.
    """
    permutation = np.argsort(np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(n), kind="stable")
    permutation.flags.writeable = False
    return permutation


# Sources that come with r1jax: examples by split.
PACKAGED = {
    "countdown": countdown.problems,
    "countdown_bilingual": functools.partial(countdown.problems, languages=("en", "zh")),
    "letters": letters.examples,
}


FILES = (".jsonl", ".jsonl.gz")


def apart(given: str, training: str, key: str) -> str:
    """The source of data to validate with: what `key` gives, else a split of the training's own source.

    Raises:
        ValueError: that is a file, which has no splits.
    """
    if not given and training.endswith(FILES):
        raise ValueError(f"{key} is empty, and {training} has no splits: name data that is not trained on")
    return given or training


def open_source(spec: str, split: str, columns: sources.Columns, size: int = 2000, seed: int = 0) -> Source:
    """The source that `spec` (config.data.source) names.

    Args:
        spec: a name of PACKAGED, "PATH.jsonl" or "PATH.jsonl.gz", "tfds:NAME", "reasoning_gym:FAMILY".
        split: a part of the source; a JSONL file is one split, whatever this says.
        columns: what to read from a JSONL file or TensorFlow dataset.
        size: how many problems reasoning-gym generates for all splits together, before repeated ones are dropped.
        seed: of reasoning-gym's generator.

    Raises:
        ValueError: no such source, split or column; a corrupt, missing or empty one.
    """
    kind, _, name = spec.partition(":")
    if spec in PACKAGED:
        examples = PACKAGED[spec](split)
    elif spec.endswith(FILES):
        examples = sources.read_jsonl(spec, columns)
    elif kind == "tfds" and name:
        examples = sources.read_tfds(name, split, columns)
    elif kind == "reasoning_gym" and name:
        examples = sources.generate_reasoning_gym(name, split, size, seed)
    else:
        raise ValueError(
            f"config.data.source is {spec!r}; it must be {', '.join(PACKAGED)}, a path that ends in .jsonl or "
            ".jsonl.gz, 'tfds:NAME' or 'reasoning_gym:FAMILY'"
        )
    if not examples:
        raise ValueError(f"config.data.source {spec!r} has no examples in split {split!r}")
    return Source(name=spec, examples=tuple(examples))
