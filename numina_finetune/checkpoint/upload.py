"""From host memory to storage, on threads of its own: one host's files of one checkpoint."""

from __future__ import annotations

import io
import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import IO, cast

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from numina_finetune.checkpoint.layout import (
    ACCELERATE,
    STATE,
    BlockedFile,
    Facts,
    HostIndex,
    Stored,
    done_name,
)
from numina_finetune.checkpoint.parallel import in_order
from numina_finetune.checkpoint.shards import Shard
from numina_finetune.storage import Entry, Store

FILE_BYTES = 1 << 29
"""A file takes shards up to this size (or one larger shard): several files go up at a time, and free their memory."""
BLOCK_BYTES = 1 << 23
UPLOADS = 4
_SLICE = 1 << 22
"""Bytes whose checksum is taken at a time, while no other thread can run."""


@dataclass
class Captured:
    """One host's state at one step, in host memory."""

    shards: list[Shard]
    small: dict[str, bytes]
    """Accelerate's files, by name."""

    @property
    def bytes(self) -> int:
        return sum(len(shard.data) for shard in self.shards) + sum(map(len, self.small.values()))


@dataclass
class _File:
    name: str
    shards: list[Shard]


def upload_host(
    store: Store,
    prefix: str,
    host: int,
    captured: Captured,
    *,
    go_on: Callable[[], None] = lambda: None,
    file_bytes: int = FILE_BYTES,
    block_bytes: int = BLOCK_BYTES,
) -> HostIndex:
    """Write the host's files below ``prefix``; ``captured`` is emptied, and its memory freed file by file.

    Args:
        go_on: called before every piece that is sent; it raises where the upload is to be given up.
    """
    files, pieces = _plan(captured.shards, host, file_bytes)
    captured.shards.clear()

    def send(file: _File) -> tuple[str, BlockedFile]:
        arrays = [shard.data for shard in file.shards]
        file.shards.clear()
        whole, blocks = _checksums(arrays, block_bytes)
        size = sum(map(len, arrays))
        entry = store.put(
            prefix + file.name,
            lambda: cast(IO[bytes], _Memory(arrays, go_on)),
            size=size,
            checksum=whole,
            if_generation=0,
        )
        return file.name, BlockedFile(_facts(entry), block_bytes, blocks)

    sent = dict(in_order(send, files, threads=UPLOADS, ahead=len(files)))
    small = {}
    for name, data in captured.small.items():
        go_on()
        name = f"{ACCELERATE}/{host:05d}/{name}"
        small[name] = _facts(store.write(prefix + name, data, if_generation=0))
    return HostIndex(sent, small, pieces)


def confirm_host(store: Store, prefix: str, host: int, index: HostIndex) -> Entry:
    """Write the host's done object: all its files are stored and checked."""
    data = json.dumps(index.to_json()).encode()
    return store.write(prefix + done_name(host), data, if_generation=0)


def report_failure(store: Store, prefix: str, host: int, error: BaseException) -> None:
    """Write instead of the done object why there will be none, so that nobody waits for it."""
    store.write_json(prefix + done_name(host), {"error": f"{error}"}, if_generation=0)


def _facts(entry: Entry) -> Facts:
    return Facts(entry.size, entry.crc32c, entry.generation)


def _plan(shards: Sequence[Shard], host: int, file_bytes: int) -> tuple[list[_File], tuple[Stored, ...]]:
    files: list[_File] = []
    pieces = []
    size = 0
    for shard in shards:
        if not files or size + len(shard.data) > file_bytes:
            files.append(_File(f"{STATE}/{host:05d}-{len(files):05d}.bin", []))
            size = 0
        pieces.append(Stored(shard.piece, files[-1].name, size))
        files[-1].shards.append(shard)
        size += len(shard.data)
    return files, tuple(pieces)


def _checksums(arrays: Sequence[NDArray[np.uint8]], block_bytes: int) -> tuple[str, tuple[str, ...]]:
    """Of all bytes one after another, and of each block of them."""
    whole, block, blocks, left = google_crc32c.Checksum(), google_crc32c.Checksum(), [], block_bytes
    for array in arrays:
        start = 0
        while start < len(array):
            part = array[start : start + min(_SLICE, left)]
            whole.update(part)
            block.update(part)
            start, left = start + len(part), left - len(part)
            if not left:
                blocks.append(bytes(block.digest()).hex())
                block, left = google_crc32c.Checksum(), block_bytes
    if left < block_bytes:
        blocks.append(bytes(block.digest()).hex())
    return bytes(whole.digest()).hex(), tuple(blocks)


class _Memory(io.RawIOBase):
    """Arrays read one after another as if they were a file."""

    def __init__(self, arrays: Sequence[NDArray[np.uint8]], go_on: Callable[[], None]) -> None:
        self._arrays, self._go_on = arrays, go_on
        self._starts = [0, *accumulate(map(len, arrays))]
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._starts[-1]}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        self._go_on()
        end = self._starts[-1] if size is None or size < 0 else min(self._position + size, self._starts[-1])
        parts = []
        while self._position < end:
            number = bisect_right(self._starts, self._position) - 1
            start = self._position - self._starts[number]
            part = self._arrays[number][start : start + end - self._position]
            parts.append(part.data)
            self._position += len(part)
        return b"".join(parts)


def read_index(data: bytes) -> HostIndex:
    """A done object's content.

    Raises:
        ValueError, KeyError: it is not what `confirm_host` writes.
    """
    return HostIndex.of(json.loads(data))


def small_files(indices: Mapping[int, HostIndex], host: int) -> dict[str, str]:
    """Accelerate's files for a host that resumes: what the first host saved, its own in their place where it has any.

    Returns:
        Object names (without the checkpoint's prefix) by file name.
    """
    chosen = {}
    for source in (0, host):
        if source in indices:
            chosen.update({name.rpartition("/")[2]: name for name in indices[source].small})
    return chosen
