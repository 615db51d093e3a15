"""FP8 e4m3 weights with one scale per block, as DeepSeek-V3 was released (arXiv 2412.19437, section 3.3)."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
SCALE = "_scale_inv"  # what a scale tensor's name adds to its weight's
# Looking the 256 values up is ten times faster than converting one by one.
_VALUES = np.arange(256, dtype=np.uint8).view(FLOAT8).astype(np.float32)

Block = tuple[int, int]


def block_of(hf_config: Mapping[str, Any]) -> Block | None:
    """Rows and columns that share one scale, or None where the folder is not quantised.

    Raises:
        ValueError: a quantisation other than FP8 e4m3 in blocks.
    """
    given = hf_config.get("quantization_config")
    if given is None:
        return None
    block = given.get("weight_block_size")
    if given.get("quant_method") != "fp8" or given.get("fmt", "e4m3") != "e4m3" or not block or len(block) != 2:
        raise ValueError(
            f"config.json has quantization_config {dict(given)}; r1jax reads quant_method 'fp8', fmt 'e4m3' with a "
            "weight_block_size of two numbers"
        )
    return tuple(block)


def scale_shape(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """Shape of the scales of a matrix; blocks at the edges may be smaller."""
    return tuple(-(-n // b) for n, b in zip(shape, block, strict=True))


def dequantise(weight: np.ndarray, scale: np.ndarray, block: Block) -> np.ndarray:
    """Float32 values of an FP8 matrix [R, C] with scales [ceil(R / rows), ceil(C / columns)]."""
    rows, columns = weight.shape
    by_row = np.repeat(np.asarray(scale, np.float32), block[0], axis=0)[:rows]
    return _VALUES[weight.view(np.uint8)] * np.repeat(by_row, block[1], axis=1)[:, :columns]
