"""Which checkpoints exist, whether they are sound, and the way to their bytes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import google_crc32c

from numina_finetune.checkpoint.finite import WIDEST, nonfinite_in
from numina_finetune.checkpoint.layout import (
    CHECKPOINTS,
    COMMITTED,
    DONE,
    FORMAT,
    MANIFEST,
    BlockedFile,
    Facts,
    HostIndex,
    Stored,
    place_of,
    prefix_of,
    read_marker,
)
from numina_finetune.checkpoint.shards import ShardReader, fetch
from numina_finetune.checkpoint.upload import read_index, small_files
from numina_finetune.errors import CheckpointError
from numina_finetune.storage import Damaged, Entry, NotFound, Store, open_store

logger = logging.getLogger(__name__)

_HASHED_AT_ONCE = 1 << 25


class Unsound(Exception):
    """A committed checkpoint whose objects are not what was committed.

    Attributes:
        faults: one sentence each, naming the object.
    """

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = list(faults)


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint; its objects' names in the store begin with ``prefix``."""

    step: int
    attempt: int
    store: Store
    prefix: str

    @property
    def address(self) -> str:
        """Its folder or ``gs://…``, as `checkpoint_at` takes it."""
        return self.store.address(self.prefix).rstrip("/")

    def open(self) -> OpenCheckpoint:
        """Look whether everything is there that was committed, without reading the shards.

        Raises:
            Unsound: it is not.
        """
        try:
            attempt, written = read_marker(self.store.read(self.prefix + COMMITTED).decode())
            if attempt != self.attempt:
                raise Unsound([f"{self.address}/{COMMITTED} names attempt {attempt}"])
            entries = {entry.name.removeprefix(self.prefix): entry for entry in self.store.list(self.prefix)}
            found = self._as_committed(MANIFEST, written, entries)
            data = fetch(self.store, self.prefix + MANIFEST, found.generation, 0, found.size, found.crc32c)
            manifest = json.loads(data)
            if manifest["format"] != FORMAT:
                raise CheckpointError(
                    f"{self.address} is of format {manifest['format']}, this version reads {FORMAT}: use the version "
                    "that wrote it"
                )
            listed = {name: Facts.of(facts) for name, facts in manifest["files"].items()}
        except (Damaged, NotFound, ValueError, KeyError, TypeError) as error:
            raise Unsound([f"{self.address}: {MANIFEST} or {COMMITTED} cannot be read: {error}"]) from error
        files, faults = {}, []
        for name, facts in listed.items():
            try:
                files[name] = self._as_committed(name, facts, entries)
            except Damaged as error:
                faults.append(f"{error}")
        if faults:
            raise Unsound(faults)
        return OpenCheckpoint(self, manifest, files)

    def _as_committed(self, name: str, facts: Facts, entries: Mapping[str, Entry]) -> Facts:
        """The object with the committed bytes: of the committed generation, or of another one (it was copied, or
        written again by an attempt that does not know that it is over) with the same bytes.
        """
        entry = entries.get(name)
        if entry is not None and (entry.size, entry.crc32c) == (facts.size, facts.crc32c):
            return replace(facts, generation=entry.generation)
        address = self.store.address(self.prefix + name)
        old = self.store.stat(self.prefix + name, generation=facts.generation)
        if old is not None and (old.size, old.crc32c) == (facts.size, facts.crc32c):
            return facts
        if entry is None:
            raise Damaged(f"{address} is missing")
        raise Damaged(
            f"{address} has {entry.size} bytes with crc32c {entry.crc32c}, committed were {facts.size} bytes with "
            f"{facts.crc32c}"
        )


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint whose objects are there, in the generations to be read."""

    checkpoint: Checkpoint
    manifest: Mapping[str, Any]
    files: Mapping[str, Facts]

    def shards(self) -> ShardReader:
        """The model and optimizer tensors (``model.…``, ``optim.…``).

        Raises:
            Damaged, NotFound: an index is not what was committed.
        """
        indices = self._indices
        files = {
            # The generations to be read stand in this checkpoint's list, not in the writers' own.
            name: BlockedFile(self.files[name], file.block_bytes, file.blocks)
            for index in indices.values()
            for name, file in index.files.items()
        }
        pieces = [stored for index in indices.values() for stored in index.pieces]
        return ShardReader(self.checkpoint.store, self.checkpoint.prefix, files, pieces)

    def small(self, host: int) -> dict[str, bytes]:
        """Accelerate's files for the process ``host``, by name.

        Raises:
            Damaged, NotFound: one of them is not what was committed.
        """
        return {file: self._read(name) for file, name in small_files(self._indices, host).items()}

    def hash_faults(self, only: str | None = None) -> Iterator[str]:
        """Read every byte; what differs from what was committed, and tensors with values that are not finite.

        Args:
            only: the file to be read; None = all.
        """
        store, prefix = self.checkpoint.store, self.checkpoint.prefix
        for name, facts in self.files.items() if only is None else [(only, self.files[only])]:
            checksum, address = google_crc32c.Checksum(), store.address(prefix + name)
            pieces, wrong = self._pieces.get(name, []), dict[str, None]()
            try:
                for start in range(0, facts.size, _HASHED_AT_ONCE):
                    end = min(start + _HASHED_AT_ONCE, facts.size)
                    # A value may begin in one part and end in the next.
                    more = min(end + WIDEST, facts.size)
                    data = store.read(prefix + name, generation=facts.generation, start=start, end=more)
                    checksum.update(data[: end - start])
                    wrong |= dict.fromkeys(nonfinite_in(data, start, end, pieces))
            except NotFound:
                yield f"{address} is missing"
                continue
            found = bytes(checksum.digest()).hex()
            if found != facts.crc32c:
                yield f"{address} has crc32c {found}, committed was {facts.crc32c}"
            yield from (f"{address}: {tensor} has values that are not finite" for tensor in wrong)

    @cached_property
    def _pieces(self) -> dict[str, list[Stored]]:
        """What lies in each file of shards; nothing where an index is damaged, which its own checksum tells."""
        found: dict[str, list[Stored]] = {}
        try:
            for index in self._indices.values():
                for stored in index.pieces:
                    found.setdefault(stored.file, []).append(stored)
        except (Damaged, NotFound):
            return {}
        return found

    @cached_property
    def _indices(self) -> dict[int, HostIndex]:
        names = sorted(name for name in self.files if name.startswith(f"{DONE}/"))
        return {host: read_index(self._read(name)) for host, name in enumerate(names)}

    def _read(self, name: str) -> bytes:
        facts, store = self.files[name], self.checkpoint.store
        return fetch(store, self.checkpoint.prefix + name, facts.generation, 0, facts.size, facts.crc32c)


def committed(store: Store) -> list[Checkpoint]:
    """The run's committed checkpoints, newest first (by step, then by attempt)."""
    places = {
        place for name in store.names(f"{CHECKPOINTS}/") if name.endswith(f"/{COMMITTED}") if (place := place_of(name))
    }
    return [Checkpoint(*place, store, prefix_of(*place)) for place in sorted(places, reverse=True)]


def checkpoint_at(url: str) -> Checkpoint:
    """The committed checkpoint in a folder, local or ``gs://…/checkpoints/step-…/attempt-…``.

    Raises:
        CheckpointError: there is none.
    """
    store = open_store(url)
    if store.stat(COMMITTED) is None:
        raise CheckpointError(
            f"--resume-from-checkpoint {url}: there is no committed checkpoint: give auto, none, a step number, or a "
            f"folder …/{prefix_of(123, 1).rstrip('/')} that has a file {COMMITTED}"
        )
    try:
        manifest = json.loads(store.read(MANIFEST))
        return Checkpoint(int(manifest["step"]), int(manifest["attempt"]), store, "")
    except (Damaged, NotFound, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"--resume-from-checkpoint {url}: {MANIFEST} there cannot be read: {error}") from error


def of_step(store: Store, step: int) -> list[Checkpoint]:
    """The committed checkpoints of one step, the newest attempt's first.

    Raises:
        CheckpointError: there is none.
    """
    found = committed(store)
    wanted = [checkpoint for checkpoint in found if checkpoint.step == step]
    if not wanted:
        steps = sorted({checkpoint.step for checkpoint in found})
        raise CheckpointError(
            f"--resume-from-checkpoint {step}: no such committed checkpoint in {store.url}: "
            f"there are steps {', '.join(map(str, steps)) or '(none)'}"
        )
    return wanted


def drop_unsound(candidates: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The candidates from the first one on that is whole, as far as can be seen without reading the shards.

    Raises:
        CheckpointError: there are candidates, and none of them is whole.
    """
    damage: list[str] = []
    for number, checkpoint in enumerate(candidates):
        try:
            checkpoint.open()
        except Unsound as error:
            say_damaged(checkpoint, error.faults[0])
            damage += error.faults
        else:
            return list(candidates[number:])
    if damage:
        raise none_left(candidates[0], damage)
    return []


def say_damaged(checkpoint: Checkpoint, fault: str) -> None:
    logger.warning("checkpoint of step %d is damaged, falling back to the one before: %s", checkpoint.step, fault)


def none_left(newest: Checkpoint, damage: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        [*damage, f"no sound checkpoint is left in {newest.store.url}: move that folder away to start anew"]
    )


def faults_of(checkpoint: Checkpoint) -> list[str]:
    """What differs between the objects, read whole, and what was committed: nothing, in a sound checkpoint."""
    try:
        return list(checkpoint.open().hash_faults())
    except Unsound as error:
        return error.faults
