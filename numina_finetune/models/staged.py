"""A model that ``numina-finetune stage`` put into a store: what it consists of, and what of it comes to this disk.

Below the model's place lie its files as they are, so that the folder opens like any model's, and ``STAGED.json``, which
was written last: every file with size and crc32c, and weights with the checksums of their blocks, so that any range of
them can be checked. Only what that lists exists for a reader. Configuration and tokenizer are downloaded; weights stay
where they are, and are read there (`numina_finetune.models.stream`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from numina_finetune.checkpoint.layout import checksum
from numina_finetune.checkpoint.parallel import in_order
from numina_finetune.errors import ConfigError
from numina_finetune.storage import Damaged, Entry, NotFound, Store, crc32c, move_unless_there, open_store

logger = logging.getLogger(__name__)

STAGED = "STAGED.json"
_MEND = "run the `numina-finetune stage` command again, which copies what is missing or not whole"
BLOCK = 2**20
"""Bytes that are fetched and checked together: more than a request for a range costs, little beside a slice."""
_DOWNLOADS = 8
"""Files on their way at a time."""
_TRIES = 3
"""Downloads of a file, or of a range, before its bytes count as damaged where they lie, not on their way."""
_DIGITS = 8


@dataclass(frozen=True)
class Facts:
    """What is known of a file."""

    size: int
    crc32c: str | None = None
    sha256: str | None = None
    """By the hub's word."""
    blocks: str | None = None
    """CRC-32C of every ``BLOCK`` bytes one after another, eight digits each; of weights only."""

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


Files = Mapping[str, Facts]


@dataclass(frozen=True)
class Record:
    """A model's files, and where they are from."""

    origin: Mapping[str, Any]
    """Another origin is another model."""
    commit: str | None
    """Of the hub's model."""
    files: Files

    @staticmethod
    def of(mapping: Mapping[str, Any]) -> Record:
        files = {name: Facts(**facts) for name, facts in mapping["files"].items()}
        return Record(mapping["origin"], mapping["commit"], files)

    def to_json(self) -> dict[str, Any]:
        files = {name: facts.to_json() for name, facts in self.files.items()}
        return {"origin": self.origin, "commit": self.commit, "files": files}


class StagedFile:
    """A file of a staged model, read in ranges; implements `numina_finetune.models.ranges.Bytes`."""

    def __init__(self, store: Store, entry: Entry, blocks: str | None) -> None:
        """
        Args:
            blocks: see `Facts`; None where the file was staged without: what is read of it is not checked.
        """
        self.address, self.size = store.address(entry.name), entry.size
        self._store, self._entry, self._blocks = store, entry, blocks

    def read(self, start: int, end: int) -> torch.Tensor:
        """``[end - start]`` bytes, uint8; the blocks around them are fetched in one request, and checked.

        Raises:
            ConfigError: they are not what was staged, or the file was replaced.
            StorageError: network or server faults that lasted.
        """
        first = start // BLOCK * BLOCK if self._blocks else start
        last = min(-(-end // BLOCK) * BLOCK, self.size) if self._blocks else end
        for _ in range(_TRIES):
            try:
                data = self._store.read(self._entry.name, generation=self._entry.generation, start=first, end=last)
            except NotFound as error:
                raise ConfigError(f"{error}: it was replaced or deleted while it was read: begin again") from error
            if len(data) == last - first and self._is_sound(first, data):
                return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=start - first, count=end - start)
        raise ConfigError(f"bytes {first} to {last} of {self.address} are not what was staged: {_MEND}")

    def _is_sound(self, first: int, data: bytes) -> bool:
        if not self._blocks:
            return True
        number = first // BLOCK * _DIGITS
        found = block_checksums([data])
        return self._blocks[number : number + len(found)] == found


@dataclass(frozen=True)
class StagedModel:
    """A model in a store."""

    store: Store
    record: Record

    def weights(self) -> dict[str, StagedFile]:
        """The files with its weights, by name, in the generations to be read.

        Raises:
            ConfigError: one of them is not what was staged.
        """
        files = {name: facts for name, facts in self.record.files.items() if is_weights(name)}
        entries = {entry.name: entry for entry in self.store.list() if entry.name in files}
        if faults := _faults(entries, files):
            raise ConfigError(f"{self.store.address(faults[0])} is not what was staged: {_MEND}")
        return {name: StagedFile(self.store, entries[name], facts.blocks) for name, facts in files.items()}

    def download(self, local: Path) -> Path:
        """The folder below ``local`` with all but the weights: checked, once for all processes here.

        Raises:
            ConfigError: a file is damaged, or the disk is too small for them.
        """
        files = {name: facts for name, facts in self.record.files.items() if not is_weights(name)}
        # The content's name: what was staged anew in the same place is another folder.
        key = hashlib.sha256(json.dumps(self.record.to_json()["files"], sort_keys=True).encode()).hexdigest()
        folder = local / f"{self.store.url.rpartition('/')[2]}-{key[:12]}"
        local.mkdir(parents=True, exist_ok=True)
        with FileLock(local / f".{folder.name}.lock"):
            if not folder.is_dir():
                partial = local / f".{folder.name}.partial"
                _download(self.store, files, partial)
                move_unless_there(partial, folder)
        return folder


def open_staged(url: str) -> StagedModel:
    """The model in a store.

    Args:
        url: what ``numina-finetune stage`` printed.

    Raises:
        ConfigError: there is no staged model, or its record is damaged.
        StorageError: network or server faults that lasted.
    """
    store = open_store(url)
    record = read_record(store, STAGED)
    if record is None:
        raise ConfigError(
            f"{store.url} holds no staged model: give the name that `numina-finetune stage` printed, or run it again"
        )
    return StagedModel(store, record)


def read_record(store: Store, name: str) -> Record | None:
    """The record in an object; None where there is none.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        return Record.of(json.loads(store.read(name)))
    except NotFound:
        return None
    except (Damaged, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{store.address(name)} is damaged ({error}): delete it, and {_MEND}") from error


def missing_files(store: Store, files: Files) -> list[str]:
    """Those that are not in the store, or not as they should be."""
    return _faults({entry.name: entry for entry in store.list()}, files)


def _faults(present: Mapping[str, Entry], files: Files) -> list[str]:
    def is_there(name: str, facts: Facts) -> bool:
        entry = present.get(name)
        return entry is not None and entry.size == facts.size and facts.crc32c in (None, entry.crc32c)

    return [name for name, facts in files.items() if not is_there(name, facts)]


def block_checksums(chunks: Iterable[bytes]) -> str:
    """Of a file that comes in chunks of whole blocks: see `Facts`."""
    return "".join(checksum(chunk[start : start + BLOCK]) for chunk in chunks for start in range(0, len(chunk), BLOCK))


def is_weights(name: str) -> bool:
    """Whether the file holds weights."""
    return name.endswith(".safetensors")


def _download(store: Store, files: Files, folder: Path) -> None:
    """Make ``folder`` hold the files; what an earlier try left there, and is sound, stays."""
    folder.mkdir(exist_ok=True)
    wanted = [name for name, facts in files.items() if not _is_on_disk(folder / name, facts)]
    needed, free = sum(files[name].size for name in wanted), shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"{store.url} needs {needed / 1e9:.2f} GB more in {folder.parent}, where {free / 1e9:.2f} GB are free: "
            "make room there"
        )
    logger.info("downloading %s: %d files, %.2f GB", store.url, len(wanted), needed / 1e9)

    def download(name: str) -> None:
        _download_file(store, name, files[name], folder / name)

    try:
        for _ in in_order(download, wanted, threads=_DOWNLOADS, ahead=_DOWNLOADS):
            pass
    except (Damaged, NotFound) as error:
        raise ConfigError(f"{error}: {_MEND}") from error


def _download_file(store: Store, name: str, facts: Facts, path: Path) -> None:
    for turn in range(1, _TRIES + 1):
        try:
            entry = store.download(name, path)
        except Damaged:
            if turn == _TRIES:
                raise
        else:
            break
    if (entry.size, entry.crc32c) != (facts.size, facts.crc32c):
        raise Damaged(f"{store.address(name)} is not what was staged")


def _is_on_disk(path: Path, facts: Facts) -> bool:
    return path.is_file() and path.stat().st_size == facts.size and crc32c(path) == facts.crc32c
