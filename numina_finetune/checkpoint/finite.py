"""Which tensors of a checkpoint's files hold values that are not finite, told from their bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from numina_finetune.checkpoint.layout import Stored

_EXPONENTS: dict[str, tuple[type[np.unsignedinteger], int]] = {
    "float64": (np.uint64, 0x7FF0_0000_0000_0000),
    "float32": (np.uint32, 0x7F80_0000),
    "bfloat16": (np.uint16, 0x7F80),
    "float16": (np.uint16, 0x7C00),
}
"""Type of a value's bits, and those that are all 1 where it is infinite or no number."""
WIDEST = 8
"""Bytes of the widest value."""


def nonfinite_in(data: bytes, start: int, end: int, pieces: Sequence[Stored]) -> Iterator[str]:
    """Names of the tensors with values that are not finite and begin between two places of a file.

    Args:
        data: the file's bytes from ``start`` on, and of the last value that begins before ``end`` all of them.
        pieces: what lies in the file.
    """
    for stored in pieces:
        if stored.piece.dtype not in _EXPONENTS:
            continue
        bits, exponent = _EXPONENTS[stored.piece.dtype]
        width = np.dtype(bits).itemsize
        first = max(0, -(-(start - stored.start) // width))
        last = min(math.prod(stored.piece.sizes), -(-(end - stored.start) // width))
        if first >= last:
            continue
        offset = stored.start + first * width - start
        values: NDArray[np.unsignedinteger] = np.frombuffer(data, np.uint8, (last - first) * width, offset).view(bits)
        if ((values & bits(exponent)) == bits(exponent)).any():
            yield stored.piece.name
