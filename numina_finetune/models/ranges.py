"""Parts of tensors out of safetensors files, wherever their bytes are: only what a part spans of them is read.

A file is eight bytes with the length of its header, the header (JSON: each tensor's type, shape and place), and the
tensors' bytes, row-major.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch

from numina_finetune.errors import ConfigError

Part = tuple[slice, ...]
"""``start`` and ``stop`` along each dimension."""
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
}
STORED_TYPES = {dtype: name for name, dtype in _TYPES.items()}
"""The format's names of types."""
LENGTH_BYTES = 8
"""Of the header's length, in front of it, little-endian."""
_LONGEST_HEADER = 10**8
"""What the format allows."""


class Bytes(Protocol):
    """A file's bytes; read from several threads at a time."""

    address: str
    """As messages name the file."""
    size: int

    def read(self, start: int, end: int) -> torch.Tensor:
        """``[end - start]`` bytes, uint8; fewer where the file is shorter than it was."""


class LocalBytes:
    """A file on this disk. A range is mapped, and its pages are let go along with the tensor that `read` gave."""

    def __init__(self, path: Path) -> None:
        self.address, self.size = str(path), path.stat().st_size
        self._path = path

    def read(self, start: int, end: int) -> torch.Tensor:
        begin = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with self._path.open("rb") as file:
            end = min(end, os.fstat(file.fileno()).st_size)
            if end <= start:
                return torch.empty(0, dtype=torch.uint8)
            # Pages that are written to would be copied; none is.
            mapped = mmap.mmap(file.fileno(), end - begin, access=mmap.ACCESS_COPY, offset=begin)
        return torch.frombuffer(mapped, dtype=torch.uint8, offset=start - begin)


@dataclass(frozen=True)
class _Place:
    """Where a tensor is in its file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """A safetensors file."""

    def __init__(self, data: Bytes) -> None:
        self._data = data

    @property
    def names(self) -> Sequence[str]:
        """The tensors in it."""
        return list(self._places)

    @property
    def name(self) -> str:
        """Of the file, without its folder."""
        return self._data.address.rpartition("/")[2]

    def samples(self, count: int, size: int) -> Iterator[bytes]:
        """What the file says of its tensors, and ``size`` bytes from each of ``count`` places in it."""
        yield f"{self.name} {self._data.size} {sorted(self._places.items())}".encode()
        for number in range(count):
            start = self._data.size * number // count
            yield self._data.read(start, min(start + size, self._data.size)).numpy().tobytes()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor.

        Raises:
            ConfigError: it is not there, or its bytes are not.
        """
        place = self._places.get(name)
        if place is None:
            raise ConfigError(f"{self._data.address} lacks {name}, which its index names: give a whole model")
        if place.dtype not in _TYPES:
            raise ConfigError(
                f"{name} in {self._data.address} is of type {place.dtype}: use weights of one of {', '.join(_TYPES)}"
            )
        if place.end - place.start != math.prod(place.shape) * _TYPES[place.dtype].itemsize:
            raise self._damaged(f"{name} has {place.end - place.start} bytes for {place.dtype} {list(place.shape)}")
        if place.end > self._data.size:
            raise self._damaged(f"{name} ends at byte {place.end}, the file at {self._data.size}")
        return place.shape

    def item_bytes(self, name: str) -> int:
        """Of one value."""
        return _TYPES[self._places[name].dtype].itemsize

    def read(self, name: str, part: Part) -> torch.Tensor:
        """The values of a part; a view of the bytes that it spans, from its first value to its last.

        Raises:
            ConfigError: they are not all there.
        """
        shape, place = self.shape(name), self._places[name]
        sizes = [one.stop - one.start for one in part]
        dtype, strides = _TYPES[place.dtype], _strides(shape)
        if 0 in sizes:
            return torch.empty(sizes, dtype=dtype)
        first = sum(one.start * stride for one, stride in zip(part, strides, strict=True))
        last = sum((one.stop - 1) * stride for one, stride in zip(part, strides, strict=True))
        start, end = place.start + first * dtype.itemsize, place.start + (last + 1) * dtype.itemsize
        data = self._data.read(start, end)
        if len(data) != end - start:
            raise self._damaged(f"{name} ends before byte {end}")
        return data.view(dtype).as_strided(sizes, strides)

    @cached_property
    def _places(self) -> dict[str, _Place]:
        try:
            if self._data.size < LENGTH_BYTES:
                raise ValueError(f"the file has {self._data.size} bytes")
            length = int.from_bytes(self._data.read(0, LENGTH_BYTES).numpy().tobytes(), "little")
            if not 0 < length <= min(_LONGEST_HEADER, self._data.size - LENGTH_BYTES):
                raise ValueError(f"its header would have {length} bytes")
            begin = LENGTH_BYTES + length
            header = json.loads(self._data.read(LENGTH_BYTES, begin).numpy().tobytes())
            return {
                name: _Place(told["dtype"], tuple(told["shape"]), *(begin + end for end in told["data_offsets"]))
                for name, told in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(f"no safetensors header: {error}") from error

    def _damaged(self, why: str) -> ConfigError:
        return ConfigError(f"{self._data.address} is damaged or cut short ({why}): copy or download it again")


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
