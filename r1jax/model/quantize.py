"""Matrices in eight bits while completions are sampled: int8 or float8 e4m3, one float32 scale per output channel.

Symmetric and by the largest value of a channel, as LLM.int8() has it (arXiv 2208.07339, section 3) and, in e4m3,
DeepSeek-V3 (2412.19437, section 3.3). A scale that no summed axis has can wait until after the product: the matrix
itself is only converted, which a TPU does within the product, so that each step reads half of what bfloat16 takes.
"""

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from r1jax.types import Params

KINDS = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}

# What is quantized, by name, and the axes that a product sums over, counted from the end. Not here: norms, biases and
# the router, which are small; the embedding, of which a step reads one row a token and multiplies none; and the head,
# whose errors are the logits' own (DeepSeek-V3 keeps these in higher precision as well).
SUMMED = {
    **dict.fromkeys(("q_a", "kv_a", "gate", "up", "down"), (-2,)),
    **dict.fromkeys(("q", "k", "v", "q_b", "v_b"), (-3,)),
    "k_b": (-1,),  # as decoding has it, absorbed into the query; expanded it is summed over the latent
    "o": (-3, -2),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """The matrix values * scale.

    Attributes:
        values: int8 or float8_e4m3fn.
        scale: float32, of as many axes; one long where the matrix is summed over.
    """

    values: Any  # arrays, or what stands for them in trees of shapes, logical axes and shardings
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix's."""
        return self.values.shape


Matrix = Float[Array, "..."] | Quantized


def quantize(w: Float[Array, "..."], summed: tuple[int, ...], kind: str) -> Quantized:
    """The nearest matrix of a kind; a channel's largest value becomes the largest that there is."""
    dtype = KINDS[kind]
    is_whole = jnp.issubdtype(dtype, jnp.integer)
    largest = float((jnp.iinfo if is_whole else jnp.finfo)(dtype).max)
    w = w.astype(jnp.float32)
    scale = jnp.abs(w).max(summed, keepdims=True) / largest
    scale = jnp.where(scale == 0, 1, scale)  # of a channel of zeros
    # Rounding in the division may lead beyond the largest value, which e4m3 turns into NaN.
    values = jnp.clip(w / scale, -largest, largest)
    return Quantized((jnp.round(values) if is_whole else values).astype(dtype), scale)


def dequantize(w: Matrix, dtype: DTypeLike) -> Float[Array, "..."]:
    """The matrix as an array; one that is not quantized is left as it is."""
    return (w.values.astype(jnp.float32) * w.scale).astype(dtype) if isinstance(w, Quantized) else w


def product(equation: str, x: Float[Array, "..."], w: Matrix) -> Float[Array, "..."]:
    """einsum(equation, x, w); the result's axes that come from w must be its last."""
    if not isinstance(w, Quantized):
        return jnp.einsum(equation, x, w)
    _, ours, result = re.split(",|->", equation)
    assert all(n == 1 for axis, n in zip(ours, w.scale.shape, strict=True) if axis not in result), equation
    scale = jnp.einsum(f"{ours}->{''.join(axis for axis in result if axis in ours)}", w.scale)
    return (jnp.einsum(equation, x, w.values.astype(x.dtype)) * scale).astype(x.dtype)


def _each_matrix(tree: Params, make: Callable[[Any, tuple[int, ...]], Any]) -> Params:
    def one(path: tuple, leaf: Any) -> Any:
        summed = SUMMED.get(path[-1].key)
        return leaf if summed is None else make(leaf, summed)

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=lambda a: isinstance(a, tuple))


def quantized(params: Params, kind: str) -> Params:
    """A model's weights with `Quantized` ones in place of its large matrices."""
    return _each_matrix(params, partial(quantize, kind=kind))


def logical_axes(axes: Params) -> Params:
    """Logical axes of the quantized weights, of the whole ones': a scale lies as its channels do."""

    def both(names: tuple, summed: tuple[int, ...]) -> Quantized:
        return Quantized(names, tuple(None if i - len(names) in summed else name for i, name in enumerate(names)))

    return _each_matrix(axes, both)
