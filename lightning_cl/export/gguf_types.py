"""Types of numbers in GGUF files: plain ones, blocks of 32 with a scale, and K-types in blocks of 256.

The package ``gguf`` packs F32, F16, BF16, Q8_0, Q5_0, Q5_1, Q4_0 and Q4_1. K-types need the package ``libgguf``, which
packs them as llama.cpp does, byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class _Package:
    """The package ``gguf``, imported when something of it is first used: other formats do without it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    @cached_property
    def _module(self) -> Any:
        try:
            import gguf
        except ImportError as error:
            raise ImportError('a GGUF file needs the package gguf: pip install "lightning_cl[gguf]"') from error
        return gguf


gguf: Any = _Package()


class Type(IntEnum):
    """Types of tensors, with their numbers in a file."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    BF16 = 30


_LARGEST_F16 = 65504.0


@dataclass(frozen=True)
class FileType:
    """Types of the matrices in a file; vectors are always F32.

    Attributes:
        name: as a user writes it.
        matrix: of the matrices.
        output: of the output matrix, which is the embedding where they are tied: errors in it reach every logit.
        short: of a matrix whose rows the first type's block does not divide.
        number: the file's type in its metadata.
    """

    name: str
    matrix: Any
    output: Any
    short: Any
    number: int

    def of(self, name: str, shape: tuple[int, ...], tied: bool) -> Any:
        """Returns the type of one tensor.

        Args:
            name: in the file.
            shape: rows and columns.
            tied: the embedding is the output matrix too.
        """
        if len(shape) < 2:
            return Type.F32
        chosen = self.output if name == ("token_embd.weight" if tied else "output.weight") else self.matrix
        for kind in (chosen, self.short, Type.F16):
            if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
                return kind
        raise AssertionError


# Name, types of the matrices, of the output matrix and of short rows, and the file's number: llama.cpp's MOSTLY_…_S.
_ROWS = [
    ("f32", Type.F32, Type.F32, Type.F32, 0),
    ("f16", Type.F16, Type.F16, Type.F16, 1),
    ("bf16", Type.BF16, Type.BF16, Type.BF16, 32),
    ("q8_0", Type.Q8_0, Type.Q8_0, Type.F16, 7),
    ("q5_1", Type.Q5_1, Type.Q8_0, Type.F16, 9),
    ("q5_0", Type.Q5_0, Type.Q8_0, Type.F16, 8),
    ("q4_1", Type.Q4_1, Type.Q8_0, Type.F16, 3),
    ("q4_0", Type.Q4_0, Type.Q8_0, Type.F16, 2),
    ("q6_k", Type.Q6_K, Type.Q6_K, Type.Q8_0, 18),
    ("q5_k", Type.Q5_K, Type.Q6_K, Type.Q5_1, 16),
    ("q4_k", Type.Q4_K, Type.Q6_K, Type.Q5_0, 14),
    ("q3_k", Type.Q3_K, Type.Q6_K, Type.Q4_0, 11),
    ("q2_k", Type.Q2_K, Type.Q6_K, Type.Q4_0, 10),
]
FILE_TYPES = {row[0]: FileType(*row) for row in _ROWS}
_K_TYPES = frozenset({Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K})

# The largest error of a number, as a share of the largest magnitude in its block: the step of the type (half of it
# where the scale fits both signs), and the rounding of the block's scale to 16 bits. For K-types, whose inner scales
# are rounded too, it is a bound that a wrong number breaks and a rounded one does not.
_STEPS = {
    Type.Q8_0: 0.5 / 127,
    Type.Q5_1: 1 / 31,
    Type.Q5_0: 1 / 16,
    Type.Q4_1: 1 / 15,
    Type.Q4_0: 1 / 8,
    Type.Q6_K: 1 / 16,
    Type.Q5_K: 1 / 8,
    Type.Q4_K: 1 / 4,
    Type.Q3_K: 1 / 2,
    Type.Q2_K: 3 / 4,
}


def file_type(name: str) -> FileType:
    """Looks up the type of a file.

    Raises:
        ValueError: if there is no such type.
        ImportError: if ``gguf``, or ``libgguf`` for a K-type, is not installed.
    """
    known = name.lower().strip() if isinstance(name, str) else ""
    found = FILE_TYPES.get(known.removesuffix("_s"))  # llama.cpp writes Q4_K_S for files whose matrices are all Q4_K
    if found is None and known.removesuffix("_m").removesuffix("_l") in FILE_TYPES:
        least = known[:-2]
        raise ValueError(
            f"type={name!r}: is a mix of types by a rule of llama.cpp's own; expected {least!r} (its {least}_s), or"
            f" make it from the f16 file: llama-quantize FILE-f16.gguf FILE.gguf {known.upper()}"
        )
    if found is None:
        raise ValueError(f"type={name!r}: expected one of {list(FILE_TYPES)}")
    _ = gguf.GGUFWriter  # raises where the package is missing
    if found.matrix in _K_TYPES:
        _libgguf()
    return found


def _libgguf() -> Any:
    try:
        import libgguf
    except ImportError as error:
        raise ImportError('K-types need the package libgguf: pip install "lightning_cl[libgguf]"') from error
    return libgguf


def encode(rows: Array, kind: Any, name: str) -> Array:
    """Packs rows of fp32 numbers.

    Args:
        rows: two dimensions for a type in blocks, any for a plain one.
        kind: the type.
        name: of the tensor, for messages.

    Returns:
        fp32 or fp16 numbers, or bytes.

    Raises:
        ValueError: if a number is not finite, or too large for F16.
    """
    if not np.isfinite(rows).all():
        raise ValueError(f"{name}: holds numbers that are not finite; the model is broken")
    if kind == Type.F16 and rows.size and float(np.abs(rows).max()) > _LARGEST_F16:
        raise ValueError(f"{name}: holds {float(np.abs(rows).max()):.3g}, which F16 cannot hold; take type='bf16'")
    if kind in _K_TYPES:
        packed: Array = _libgguf().quantize_rows(np.ascontiguousarray(rows), int(kind))
        return packed.view(np.uint8).reshape(*rows.shape[:-1], -1)
    plain: Array = gguf.quantize(np.ascontiguousarray(rows), kind)
    return plain


def decode(packed: Array, kind: Any) -> Array:
    """Returns the fp32 numbers of packed rows."""
    numbers: Array = gguf.dequantize(packed, kind)
    return numbers


def largest_error(rows: Array, kind: Any) -> Array:
    """Returns for each number of some rows the error that packing may cause.

    Args:
        rows: fp32 numbers.
        kind: the type.

    Returns:
        an array that broadcasts to the rows cut into blocks; 0 for F32, and the rounding error for F16 and BF16.
    """
    size = gguf.GGML_QUANT_SIZES[kind][0] if kind in _STEPS else 1
    blocks = np.abs(rows).reshape(*rows.shape[:-1], -1, size)
    if kind == Type.F32:
        return np.zeros_like(blocks)
    if kind == Type.F16:
        return np.maximum(blocks * np.float32(2**-11), np.float32(2**-25))
    if kind == Type.BF16:
        return blocks * np.float32(2**-8)
    largest: Array = blocks.max(axis=-1, keepdims=True)
    # A block's scale is an F16, which has steps of 2**-24 near 0: they count where all numbers of a block are tiny.
    smallest = 2**-24 * (128 * 32 if kind in _K_TYPES else 128)
    return largest * np.float32(_STEPS[kind] + 2**-9) + np.float32(smallest)
