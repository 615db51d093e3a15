"""A search tree over parts of a completion, with the selection rule of AlphaZero (PUCT: arXiv 1712.01815).

A node is a prefix of a completion, its children are continuations by a step that the policy drew. Nothing here knows
how they are drawn or valued.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Optional


@dataclasses.dataclass(eq=False)
class Node:
    """A prefix.

    Attributes:
        tokens: of the completion so far.
        prior: share of its parent's draws that gave it.
        value: what the model says its chance of success is.
        is_whole: whether nothing can follow.
        visits, total: searches that went through it, and the sum of what they found.
    """

    tokens: tuple[int, ...]
    prior: float
    value: float
    is_whole: bool
    parent: Optional["Node"] = None
    children: list["Node"] = dataclasses.field(default_factory=list)
    visits: int = 0
    total: float = 0.0

    @property
    def worth(self) -> float:
        """Mean of what was found below it; of a node that nobody has been to, what the model says."""
        return self.total / self.visits if self.visits else self.value

    def path(self) -> list["Node"]:
        """From the root's first child down to this node."""
        return [*self.parent.path(), self] if self.parent else []


def puct(node: Node, exploration: float) -> Node:
    """The child with the greatest worth plus exploration * prior * sqrt(visits of the parent) / (1 + its own)."""
    many = math.sqrt(max(node.visits, 1))
    return max(node.children, key=lambda child: child.worth + exploration * child.prior * many / (1 + child.visits))


def select(root: Node, exploration: float) -> Node:
    """The node without children that a search comes to."""
    node = root
    while node.children:
        node = puct(node, exploration)
    return node


def expand(node: Node, drawn: Sequence[tuple[int, ...]]) -> list[Node]:
    """The node's new children, not valued yet: each different continuation once, its prior the share of draws."""
    counts = collections.Counter(drawn)
    node.children = [
        Node((*node.tokens, *more), count / len(drawn), 0.0, False, node) for more, count in counts.items()
    ]
    return node.children


def back_up(node: Node, found: float) -> None:
    """Notes what a search found at a node, there and at all above it."""
    here: Node | None = node
    while here is not None:
        here.visits += 1
        here.total += found
        here = here.parent


def average(node: Node) -> float:
    """What a node is worth by the values of its children."""
    return sum(child.prior * child.value for child in node.children)


def wholes(node: Node) -> Iterator[Node]:
    """The whole completions of a tree."""
    if node.is_whole:
        yield node
    for child in node.children:
        yield from wholes(child)
