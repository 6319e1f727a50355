"""Tokenised samples on disk: memory-mapped arrays, and the parts they are split into."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numina_finetune.errors import DataError

ARRAYS: dict[str, str] = {"input_ids": "<i4", "loss_mask": "|b1", "offsets": "<i8", "source_of": "<i2"}
"""The arrays of an index, one ``.npy`` file each, and their types."""


@dataclass(frozen=True)
class TokenIndex:
    """Tokenised samples, memory-mapped.

    The arrays hold every stored sample; an index may have only some of them as members, such as a training part.
    Sample i of the index is stored sample ``members[i]``.
    """

    input_ids: NDArray[np.int32]
    """[stored tokens]."""
    loss_mask: NDArray[np.bool_]
    """[stored tokens], True where the token is a target."""
    offsets: NDArray[np.int64]
    """[stored samples + 1], where each begins."""
    source_of: NDArray[np.int16]
    """[stored samples], position of its source."""
    members: NDArray[np.int64]
    """[samples]."""
    data_key: str
    """Hash of what the index holds."""
    report: dict[str, Any]
    """Rows read, kept and dropped, by source; of all stored samples."""

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[samples], tokens of each."""
        return np.asarray(self.offsets[self.members + 1] - self.offsets[self.members])

    @cached_property
    def sources(self) -> NDArray[np.int16]:
        """[samples], position of its source."""
        return np.asarray(self.source_of[self.members])

    def sample(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """``input_ids`` and ``loss_mask`` of one sample, [its tokens] each."""
        stored = self.members[number]
        part = slice(self.offsets[stored], self.offsets[stored + 1])
        return self.input_ids[part], self.loss_mask[part]


def open_index(folder: Path) -> TokenIndex:
    """The index in ``folder``.

    Raises:
        DataError: the folder does not hold a whole index.
    """
    try:
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        whole = arrays["offsets"][-1] == len(arrays["input_ids"]) == len(arrays["loss_mask"])
    except (OSError, ValueError) as error:
        raise DataError(f"the cached data in {folder} is damaged ({error}): delete that folder") from error
    if not whole:
        raise DataError(f"the cached data in {folder} is damaged (arrays do not match): delete that folder")
    members = np.arange(len(arrays["source_of"]), dtype=np.int64)
    return TokenIndex(**arrays, members=members, data_key=report["data_key"], report=report)


def split_validation(index: TokenIndex, size: float, seed: int) -> tuple[TokenIndex, TokenIndex]:
    """The index in two: (training, validation).

    A hash of its tokens decides for each sample, so the choice does not depend on their order, and equal samples
    are on the same side (which may make the validation part a little larger than asked).

    Args:
        size: share of the samples if below 1, else their number.

    Raises:
        DataError: one of the parts would be empty.
    """
    wanted = round(size * len(index)) if size < 1 else int(size)
    if not 0 < wanted < len(index):
        raise DataError(f"--validation-size {size:g} of {len(index)} samples leaves one part empty")
    hashes = _sample_hashes(index, np.arange(len(index)), seed)
    held_out = hashes <= np.sort(hashes)[wanted - 1]
    if held_out.all():
        raise DataError(f"--validation-size {size:g}: the samples are too much alike to be split")
    return _part(index, ~held_out), _part(index, held_out)


def cap_samples(index: TokenIndex, caps: Sequence[int | None], seed: int) -> TokenIndex:
    """The index with at most so many samples of each source.

    A hash of its tokens chooses among a source's samples, so that the choice does not depend on their order.

    Args:
        caps: one for each source; None = all of its samples.
    """
    chosen = np.ones(len(index), dtype=np.bool_)
    for source, cap in enumerate(caps):
        own = np.flatnonzero(index.sources == source)
        if cap is not None and cap < len(own):
            order = np.argsort(_sample_hashes(index, own, seed), kind="stable")
            chosen[own[order[cap:]]] = False
    return index if chosen.all() else _part(index, chosen)


class GrowingArray:
    """A one-dimensional ``.npy`` file that is appended to; its header is rewritten at the end."""

    def __init__(self, path: Path, dtype: str) -> None:
        self._dtype = np.dtype(dtype)
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self._count = 0
        self._write_header()

    def append(self, values: Any) -> None:
        data = np.asarray(values, dtype=self._dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self._count += len(data) // self._dtype.itemsize

    def close(self) -> str:
        """Completes the file; returns the hash of its values."""
        self._file.seek(0)
        self._write_header()
        sync(self._file)
        self._file.close()
        return self._hash.hexdigest()

    def _write_header(self) -> None:
        # NumPy pads the header for growth along the first axis, so that it keeps its length
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self._count,)}
        np.lib.format.write_array_header_1_0(self._file, header)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sync(file: Any) -> None:
    """Onto the disk: the folder's name must never outlive its content."""
    file.flush()
    os.fsync(file.fileno())


def _sample_hashes(index: TokenIndex, samples: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """[samples], a hash of each one's tokens."""
    salt = seed.to_bytes(8, "little", signed=True)
    return np.array([_sample_hash(index.sample(sample)[0], salt) for sample in samples.tolist()], dtype=np.uint64)


def _sample_hash(input_ids: NDArray[np.int32], salt: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(input_ids.tobytes(), digest_size=8, salt=salt).digest(), "little")


def _part(index: TokenIndex, chosen: NDArray[np.bool_]) -> TokenIndex:
    members = index.members[chosen]
    return replace(index, members=members, data_key=digest(index.data_key.encode() + members.tobytes()))
