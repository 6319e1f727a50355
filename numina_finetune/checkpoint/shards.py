"""This host's part of a sharded state: taken to host memory, and filled in again from storage.

``torch.distributed.checkpoint`` plans both ways, so that a state may be read on another mesh than the one that wrote
it; the bytes in between are raw, and lie where `numina_finetune.checkpoint.layout` says.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem, SavePlanner, WriteItem

from numina_finetune.checkpoint.layout import BlockedFile, Piece, Stored, checksum
from numina_finetune.checkpoint.parallel import in_order
from numina_finetune.errors import CheckpointError
from numina_finetune.processes import ProcessGroup
from numina_finetune.storage import Damaged, Store

COPIES = 4
"""Threads for copies within host memory: what takes time is the kernel's, which hands out fresh pages."""
DOWNLOADS = 8
"""Blocks in memory that are fetched, or have been and wait for those before them."""
_TRIES = 3
"""Fetches before bytes count as damaged where they lie, not on their way."""


@dataclass
class Shard:
    """A piece of the state in host memory, as it was at one step."""

    piece: Piece
    data: NDArray[np.uint8]
    """``[bytes]``, row-major."""


class HostCopies:
    """Memory for host copies, kept from one save to the next.

    Fresh pages cost several times the copy itself, and training would stand still for both. A copy is only written over
    when the save before has ended.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self._reserving: threading.Thread | None = None

    def reserve(self, pieces: Sequence[Piece]) -> None:
        """Get the memory for these pieces in the background, so that the first save finds it."""

        def touch() -> None:
            for piece in pieces:
                self._get(piece).zero_()

        self._reserving = threading.Thread(target=touch, daemon=True, name="checkpoint-memory")
        self._reserving.start()

    def memory(self, piece: Piece) -> torch.Tensor:
        """The place of this piece's copy, with whatever is in it."""
        if self._reserving is not None:
            self._reserving.join()
        return self._get(piece)

    def _get(self, piece: Piece) -> torch.Tensor:
        key = piece.name, piece.offsets
        if key not in self._kept:
            self._kept[key] = torch.empty(piece.sizes, dtype=_dtype(piece))
        return self._kept[key]


class CopyingPlanner(DefaultSavePlanner):
    """For tensors in plain torch: gives host copies of them, since the next step will overwrite them."""

    def __init__(self, copies: HostCopies) -> None:
        super().__init__()
        self._copies = copies

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        tensor = super().resolve_data(write_item)
        assert isinstance(tensor, torch.Tensor)
        return self._copies.memory(_piece_of(write_item)).copy_(tensor.detach())


class Snapshots:
    """Copies of this host's share of the state.

    A piece that several hosts hold is written by one of them, and evenly so; who writes what is agreed on once, since
    a state keeps its layout for as long as a process lives.
    """

    def __init__(self, processes: ProcessGroup, make_planner: Callable[[], SavePlanner], *, threads: int = 1) -> None:
        """
        Args:
            make_planner: a planner whose ``resolve_data`` gives CPU tensors that nobody writes to before the next save.
            threads: that may ask the planner at a time.
        """
        self._processes, self._make_planner, self._threads = processes, make_planner, threads
        self._own: frozenset[tuple[str, tuple[int, ...]]] | None = None

    def take(self, state: dict[str, Any]) -> list[Shard]:
        """The state as it is now. Collective the first time."""
        planner = self._make_planner()
        with _quiet():
            mine = self._plan(state, planner)

            def copy(part: tuple[Piece, WriteItem]) -> Shard:
                piece, item = part
                return Shard(piece, _bytes_in(cast(torch.Tensor, planner.resolve_data(item))))

            return list(in_order(copy, mine, threads=self._threads, ahead=len(mine)))

    def pieces(self, state: dict[str, Any]) -> list[Piece]:
        """What this process will write of the state. Collective the first time."""
        with _quiet():
            return [piece for piece, _ in self._plan(state, self._make_planner())]

    def _plan(self, state: dict[str, Any], planner: SavePlanner) -> list[tuple[Piece, WriteItem]]:
        planner.set_up_planner(state, is_coordinator=True)
        planned = [(_piece_of(item), item) for item in planner.create_local_plan().items]
        if self._own is None:
            sizes = {(piece.name, piece.offsets): _bytes_of(piece) for piece, _ in planned}
            self._own = _share(self._processes.gather(sizes), self._processes.index)
        return [(piece, item) for piece, item in planned if (piece.name, piece.offsets) in self._own]


@dataclass
class _Read:
    """One planned read: a range of rows of a stored piece, on its way into a tensor."""

    item: ReadItem
    planner: LoadPlanner
    stored: Stored
    first: int
    """In the file, where the rows' bytes begin."""
    last: int
    missing: int
    """Bytes that have not come yet."""
    buffer: NDArray[np.uint8] | None = None
    target: torch.Tensor | None = None

    @staticmethod
    def of(item: ReadItem, pieces: Mapping[tuple[str, tuple[int, ...]], Stored], planner: LoadPlanner) -> _Read:
        stored = pieces[item.storage_index.fqn, tuple(item.storage_index.offset or ())]
        row = math.prod(stored.piece.sizes[1:]) * _dtype(stored.piece).itemsize
        rows = (item.storage_offsets[0], item.lengths[0]) if stored.piece.sizes else (0, 1)
        first = stored.start + rows[0] * row
        return _Read(item, planner, stored, first, first + rows[1] * row, missing=rows[1] * row)

    def take(self, position: int, data: NDArray[np.uint8]) -> None:
        """Take this read's part of ``data``, which lies at ``position`` in the file."""
        if self.buffer is None:
            self._prepare()
        assert self.buffer is not None
        first, last = max(self.first, position), min(self.last, position + len(data))
        self.buffer[first - self.first : last - self.first] = data[first - position : last - position]
        self.missing -= last - first
        if not self.missing:
            self.finish()

    def finish(self) -> None:
        """All bytes are here: put them into the tensor, where they are not in it already."""
        if self.buffer is None:
            self._prepare()
        assert self.buffer is not None and self.target is not None
        if self._needs_copy():
            rows = torch.from_numpy(self.buffer).view(_dtype(self.stored.piece)).reshape(self._box)
            for axis in range(1, rows.ndim):
                rows = rows.narrow(axis, self.item.storage_offsets[axis], self.item.lengths[axis])
            self.target.copy_(rows)
        self.planner.commit_tensor(self.item, self.target)
        self.buffer = self.target = None

    def _prepare(self) -> None:
        self.target = self.planner.resolve_tensor(self.item).detach()
        if self._needs_copy():
            self.buffer = np.empty(self.last - self.first, np.uint8)
        else:
            self.buffer = _bytes_in(self.target)

    def _needs_copy(self) -> bool:
        """Whether the bytes of the file are not, in their order, those of the tensor in memory."""
        assert self.target is not None
        return not (self.target.is_cpu and self.target.is_contiguous() and tuple(self.target.shape) == self._box)

    @property
    def _box(self) -> tuple[int, ...]:
        """Shape of the rows in the file."""
        sizes = self.stored.piece.sizes
        return (self.item.lengths[0], *sizes[1:]) if sizes else ()


class ShardReader:
    """The state in a checkpoint, whole tensors or the parts that a mesh needs, every byte checked."""

    def __init__(self, store: Store, prefix: str, files: Mapping[str, BlockedFile], pieces: Sequence[Stored]) -> None:
        """
        Args:
            prefix: of the files' names in the store.
        """
        self._store, self._prefix, self._files = store, prefix, files
        self._pieces = {(stored.piece.name, stored.piece.offsets): stored for stored in pieces}
        self._position = {name: number for number, name in enumerate(dict.fromkeys(s.piece.name for s in pieces))}

    def arranged(self, change: Callable[[Sequence[Stored]], Sequence[Stored]]) -> ShardReader:
        """The same bytes, as pieces of other tensors."""
        return ShardReader(self._store, self._prefix, self._files, change(list(self._pieces.values())))

    @cached_property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of every tensor, by name (``model.…`` and ``optim.…``)."""
        return {s.piece.name: (s.piece.shape, _dtype(s.piece)) for s in self._pieces.values()}

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor.

        Raises:
            KeyError: there is none of that name.
            Damaged: its bytes are not what was written.
        """
        shape, dtype = self.tensors[name]
        tensor = torch.empty(shape, dtype=dtype)
        self.fill({name: tensor})
        return tensor

    def fill(self, state: dict[str, Any], planner: LoadPlanner | None = None) -> None:
        """Fill ``state``'s tensors in place, from whatever mesh wrote them; no more than a shard is held besides.

        Raises:
            CheckpointError: the state holds a tensor that is not there, or of another shape.
            Damaged: the bytes are not what was written; some tensors may have been filled already.
        """
        planner = planner or DefaultLoadPlanner()
        with _quiet():
            self._refuse_mismatch(state)
            planner.set_up_planner(state, self._metadata, is_coordinator=True)
            plan = planner.finish_plan(planner.create_global_plan([planner.create_local_plan()])[0])
            reads = sorted((_Read.of(item, self._pieces, planner) for item in plan.items), key=self._order)
            for read in reads:
                if not read.missing:  # a tensor without elements
                    read.finish()
            self._fetch(reads)

    def _fetch(self, reads: Sequence[_Read]) -> None:
        """Give every read its bytes, in the order in which tensors become whole; each block is fetched once."""
        wanted: dict[tuple[str, int], list[_Read]] = {}
        for read in reads:
            size = self._files[read.stored.file].block_bytes
            for block in range(read.first // size, -(-read.last // size)):
                wanted.setdefault((read.stored.file, block), []).append(read)
        fetched = in_order(self._block, wanted, threads=DOWNLOADS, ahead=DOWNLOADS)
        for ((file, block), readers), data in zip(wanted.items(), fetched, strict=True):
            for read in readers:
                read.take(block * self._files[file].block_bytes, data)

    def _block(self, place: tuple[str, int]) -> NDArray[np.uint8]:
        name, block = place
        file = self._files[name]
        start = block * file.block_bytes
        end = min(start + file.block_bytes, file.facts.size)
        return np.frombuffer(
            fetch(self._store, self._prefix + name, file.facts.generation, start, end, file.blocks[block]), np.uint8
        )

    def _order(self, read: _Read) -> tuple[int, str, int]:
        return self._position[read.stored.piece.name], read.stored.file, read.first

    def _refuse_mismatch(self, state: Mapping[str, Any]) -> None:
        stored, faults = self.tensors, []
        for name, tensor in _flat(state):
            if name not in stored:
                faults.append(f"the model has {name}, the checkpoint {self._where} has not: it is of another model")
            elif stored[name] != (tuple(tensor.shape), tensor.dtype):
                shape, dtype = stored[name]
                faults.append(
                    f"{name} is {dtype} {list(shape)} in the checkpoint {self._where}, {tensor.dtype} "
                    f"{list(tensor.shape)} in the model: it is of another model or --precision"
                )
        if faults:
            raise CheckpointError(faults[:3])

    @property
    def _where(self) -> str:
        return self._store.address(self._prefix).rstrip("/")

    @cached_property
    def _metadata(self) -> Metadata:
        chunks: dict[str, list[ChunkStorageMetadata]] = {}
        for stored in self._pieces.values():
            piece = stored.piece
            chunk = ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))
            chunks.setdefault(piece.name, []).append(chunk)
        return Metadata(
            {
                name: TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), chunks[name])
                for name, (shape, dtype) in self.tensors.items()
            }
        )


def fetch(store: Store, name: str, generation: int, start: int, end: int, crc32c: str) -> bytes:
    """The range of an object, checked.

    Raises:
        Damaged: it does not have the checksum.
        NotFound: the object is not there in this generation.
    """
    for _ in range(_TRIES):
        data = store.read(name, generation=generation, start=start, end=end)
        found = checksum(data)
        if (len(data), found) == (end - start, crc32c):
            return data
    raise Damaged(f"{store.address(name)}: bytes {start} to {end} have crc32c {found}, {crc32c} was written")


def _share(
    held: Sequence[Mapping[tuple[str, tuple[int, ...]], int]], own: int
) -> frozenset[tuple[str, tuple[int, ...]]]:
    """The pieces that process ``own`` writes: each one by a process that holds it, those with the fewest bytes first.

    Args:
        held: for each process the pieces that it holds, and their bytes.
    """
    load = [0] * len(held)
    mine = []
    for piece in dict.fromkeys(piece for pieces in held for piece in pieces):
        writer = min((index for index, pieces in enumerate(held) if piece in pieces), key=load.__getitem__)
        load[writer] += held[writer][piece]
        if writer == own:
            mine.append(piece)
    return frozenset(mine)


def _piece_of(item: WriteItem) -> Piece:
    data = item.tensor_data
    assert data is not None, f"{item.index.fqn} is no tensor"
    dtype = str(data.properties.dtype).removeprefix("torch.")
    return Piece(item.index.fqn, dtype, tuple(data.size), tuple(data.chunk.offsets), tuple(data.chunk.sizes))


def _dtype(piece: Piece) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, piece.dtype)
    return dtype


def _bytes_of(piece: Piece) -> int:
    return math.prod(piece.sizes) * _dtype(piece).itemsize


def _bytes_in(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """``[bytes]``, the tensor's own memory where it is contiguous."""
    memory: NDArray[np.uint8] = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memory


def _flat(state: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors by their path, as planners name them."""
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{below}", tensor) for below, tensor in _flat(value))
        else:
            yield name, value


@contextmanager
def _quiet() -> Iterator[None]:
    """Deprecations inside torch and torch_xla are no news to a user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
