"""FP8 e4m3 weights with one scale per block, as DeepSeek-V3 was released (arXiv 2412.19437, section 3.3)."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = np.float32(ml_dtypes.finfo(FLOAT8).max)
SCALE = "_scale_inv"  # what a scale tensor's name adds to its weight's
# Looking the 256 values up is ten times faster than converting one by one.
_VALUES = np.arange(256, dtype=np.uint8).view(FLOAT8).astype(np.float32)

Block = tuple[int, int]
RELEASED: Block = (128, 128)


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


def described(block: Block) -> dict[str, Any]:
    """The quantization_config of a folder in such blocks, as DeepSeek-V3's `config.json` has it."""
    return {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": list(block)}


def scale_shape(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """Shape of the scales of a matrix; blocks at the edges may be smaller."""
    return tuple(-(-n // b) for n, b in zip(shape, block, strict=True))


def dequantise(weight: np.ndarray, scale: np.ndarray, block: Block, first: int = 0) -> np.ndarray:
    """Float32 values of rows `first` and following of an FP8 matrix [R, C]; `scale` [ceil(R / rows), ceil(C / columns)]
    is the whole matrix's."""
    rows, columns = weight.shape
    by_row = np.asarray(scale, np.float32)[np.arange(first, first + rows) // block[0]]
    values = _VALUES[weight.view(np.uint8)]
    values *= np.repeat(by_row, block[1], axis=1)[:, :columns]
    return values


def quantise(weight: np.ndarray, block: Block) -> tuple[np.ndarray, np.ndarray]:
    """FP8 weight and float32 scale of a matrix [R, C]; `dequantise` of it is within half a step of e4m3.

    A block's largest value becomes 448, the largest of e4m3, as in the published checkpoints.
    """
    (rows, columns), (r, c) = scale_shape(weight.shape, block), block
    padded = np.zeros((rows * r, columns * c), np.float32)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.reshape(rows, r, columns, c)
    scale = np.abs(blocks).max((1, 3)) / LARGEST
    scale[scale == 0] = 1  # a block of zeros
    blocks /= scale[:, None, :, None]
    # Rounding in the division may lead beyond the largest value, which e4m3 turns into NaN.
    np.clip(padded, -LARGEST, LARGEST, out=padded)
    return padded[: weight.shape[0], : weight.shape[1]].astype(FLOAT8), scale
