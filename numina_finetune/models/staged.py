"""A model that ``numina-finetune stage`` put into a store: what it consists of, and what of it comes to this disk.

Below the model's place lie its files as they are, so that the folder opens like any model's, and ``STAGED.json``, which
was written last: every file with size and crc32c. Only what that lists exists for a reader. Configuration and tokenizer
are downloaded; weights stay where they are, and are read there (`numina_finetune.models.stream`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from numina_finetune.checkpoint.parallel import in_order
from numina_finetune.errors import ConfigError
from numina_finetune.storage import Damaged, Entry, NotFound, Store, crc32c, move_unless_there, open_store

logger = logging.getLogger(__name__)

STAGED = "STAGED.json"
_MEND = "run the `numina-finetune stage` command again, which copies what is missing or not whole"
_DOWNLOADS = 8
"""Files on their way at a time."""
_TRIES = 3
"""Downloads of a file before its bytes count as damaged where they lie, not on their way."""


@dataclass(frozen=True)
class Facts:
    """What is known of a file."""

    size: int
    crc32c: str | None = None
    sha256: str | None = None
    """By the hub's word."""

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


@dataclass(frozen=True)
class StagedModel:
    """A model in a store."""

    store: Store
    record: Record

    def weights(self) -> list[Entry]:
        """The files with its weights, in the generations to be read.

        Raises:
            ConfigError: one of them is not what was staged.
        """
        files = {name: facts for name, facts in self.record.files.items() if _is_weights(name)}
        entries = {entry.name: entry for entry in self.store.list() if entry.name in files}
        if faults := _faults(entries, files):
            raise ConfigError(f"{self.store.address(faults[0])} is not what was staged: {_MEND}")
        return [entries[name] for name in files]

    def download(self, local: Path) -> Path:
        """The folder below ``local`` with all but the weights: checked, once for all processes here.

        Raises:
            ConfigError: a file is damaged, or the disk is too small for them.
        """
        files = {name: facts for name, facts in self.record.files.items() if not _is_weights(name)}
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


def _is_weights(name: str) -> bool:
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
