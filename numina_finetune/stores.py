"""The store interface, and the store in a local folder.

A store holds named objects that are whole or absent, each with a generation that changes with every write. A write can
be bound to the generation that it replaces (0: the name must be free), which is what claims and commits are made of.
The semantics are Cloud Storage's (https://cloud.google.com/storage/docs/request-preconditions); a local folder is given
the same ones.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, BinaryIO

import google_crc32c

from numina_finetune.errors import ConfigError
from numina_finetune.files import crc32c, read_json, sync_folder

_COPY_CHUNK = 1 << 22
_NO_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class StorageError(Exception):
    """Storage did not do what was asked; on its own, a retry may mend it."""


class NotFound(StorageError):
    """There is no such object, or not in that generation."""


class PreconditionFailed(StorageError):
    """The object's generation is not the one that the request was bound to: someone else has written."""


class Damaged(StorageError):
    """The bytes are not those of the recorded checksum."""


class StorageUnavailable(StorageError):
    """Network or server faults lasted longer than the retries."""


@dataclass(frozen=True)
class Entry:
    """What is known of an object without reading it."""

    name: str
    size: int
    crc32c: str
    """Eight hexadecimal digits."""
    generation: int
    """Positive; another number after every write."""
    updated: datetime


class Store(ABC):
    """Objects below one place, named by ``/``-separated paths relative to it.

    Every method may raise `StorageUnavailable`, and ConfigError where no retry can help: the place does not exist,
    or this account may not use it.
    """

    url: str
    """The place, as the user wrote it."""

    def __init__(self, url: str, chunk_bytes: int) -> None:
        self.url, self._chunk_bytes = url.rstrip("/") or "/", chunk_bytes

    def address(self, name: str) -> str:
        """The object as messages name it."""
        return f"{self.url}/{name}"

    @abstractmethod
    def list(self, prefix: str = "") -> Sequence[Entry]:
        """The objects whose names begin with ``prefix``, by name."""

    def names(self, prefix: str = "") -> Sequence[str]:
        """The names that `list` gives, where nothing else is asked."""
        return [entry.name for entry in self.list(prefix)]

    @abstractmethod
    def folders(self) -> Sequence[str]:
        """The first parts of the names of all objects that have another part, in order, without going through them."""

    @abstractmethod
    def stat(self, name: str, *, generation: int | None = None) -> Entry | None:
        """The object, None where there is none (or not in that generation)."""

    @abstractmethod
    def read(
        self, name: str, *, generation: int | None = None, start: int | None = None, end: int | None = None
    ) -> bytes:
        """The object's bytes, or the part ``[start:end]`` of them; the whole is checked against its checksum.

        Raises:
            NotFound: no such object, or not in that generation.
            Damaged: the whole does not have the recorded checksum.
        """

    @abstractmethod
    def put(
        self,
        name: str,
        open_source: Callable[[], IO[bytes]],
        *,
        size: int,
        checksum: str,
        if_generation: int | None = None,
    ) -> Entry:
        """Make what the source gives the object, in pieces.

        Args:
            open_source: gives the bytes from their beginning, as often as it is asked.
            checksum: their CRC-32C, eight hexadecimal digits.
            if_generation: what the object replaces; 0: nothing; None: whatever is there.

        Raises:
            PreconditionFailed: something else is there, and stays.
            Damaged: the bytes do not have the checksum.
        """

    def write(self, name: str, data: bytes, *, if_generation: int | None = None) -> Entry:
        """Make ``data`` the object, as `put` does."""
        checksum = bytes(google_crc32c.Checksum(data).digest()).hex()
        return self.put(name, lambda: io.BytesIO(data), size=len(data), checksum=checksum, if_generation=if_generation)

    def write_json(self, name: str, value: Any, *, if_generation: int | None = None) -> Entry:
        """Make the value, as indented JSON in UTF-8, the object, as `write` does."""
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        return self.write(name, text.encode(), if_generation=if_generation)

    def upload(self, path: Path, name: str, *, if_generation: int | None = None) -> Entry:
        """Make the file's content the object, as `put` does."""
        return self.put(
            name,
            lambda: path.open("rb"),
            size=path.stat().st_size,
            checksum=crc32c(path),
            if_generation=if_generation,
        )

    @abstractmethod
    def delete(self, name: str, *, if_generation: int | None = None) -> None:
        """Delete the object; one that is gone already is fine.

        Raises:
            PreconditionFailed: the object is of another generation, and stays.
        """

    def location(self) -> str | None:
        """Where the bucket lies, such as ``US-EAST5`` or ``EU``; None for folders."""
        return None

    @abstractmethod
    def sweep(self) -> None:
        """Remove what writers that died left unfinished."""

    def download(self, name: str, path: Path, *, generation: int | None = None) -> Entry:
        """The object as a file, in pieces: on return it is whole, checked and durable.

        Raises:
            NotFound: no such object, or not in that generation (also: it was replaced meanwhile).
            Damaged: the bytes do not have the recorded checksum; ``path`` is untouched.
        """
        entry = self.stat(name, generation=generation)
        if entry is None:
            raise self._absent(name, generation)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
        checksum = google_crc32c.Checksum()
        try:
            with temporary.open("xb") as file:
                for start in range(0, entry.size, self._chunk_bytes):
                    end = min(start + self._chunk_bytes, entry.size)
                    data = self.read(name, generation=entry.generation, start=start, end=end)
                    checksum.update(data)
                    file.write(data)
                self._refuse_damage(entry, file.tell(), checksum)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
        return entry

    def _refuse_damage(self, entry: Entry, size: int, checksum: Any) -> None:
        found = bytes(checksum.digest()).hex()
        if (size, found) != (entry.size, entry.crc32c):
            raise Damaged(
                f"{self.address(entry.name)} (generation {entry.generation}) gave {size} bytes with crc32c {found}, "
                f"recorded are {entry.size} bytes with {entry.crc32c}"
            )

    def _absent(self, name: str, generation: int | None) -> NotFound:
        which = "" if generation is None else f" of generation {generation}"
        return NotFound(f"{self.address(name)}: no such object{which}")

    def _in_the_way(self, name: str, if_generation: int | None) -> PreconditionFailed:
        what = "an object exists" if if_generation == 0 else f"the object is not of generation {if_generation}"
        return PreconditionFailed(f"{self.address(name)}: {what}")


def checked_name(name: str) -> str:
    """The name, if both kinds of store can hold it as it is."""
    if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError(f"{name!r} is no object name: parts between / must not be empty, . or ..")
    return name


class LocalStore(Store):
    """Objects as plain files. A file's generation is its modification time in nanoseconds, set at every write.

    ``.store/`` below the root holds the writers' lock, their unfinished files, and for each object the checksum of
    what was written, so that a later damage shows. A file that was put there by hand has the checksum that it has.
    """

    OWN = ".store"

    def __init__(self, root: Path, chunk_bytes: int) -> None:
        super().__init__(str(root), chunk_bytes)
        self._root, self._own = root, root / self.OWN

    def list(self, prefix: str = "") -> Sequence[Entry]:
        entries = (self.stat(name) for name in self.names(prefix))
        return [entry for entry in entries if entry]

    def names(self, prefix: str = "") -> Sequence[str]:
        return sorted(self._names(prefix), key=str.encode)

    def folders(self) -> Sequence[str]:
        if not self._root.is_dir():
            return []
        return sorted(path.name for path in self._root.iterdir() if path.is_dir() and path != self._own)

    def stat(self, name: str, *, generation: int | None = None) -> Entry | None:
        try:
            with self._path(name).open("rb") as file:
                entry = self._entry(name, file)
        except _NO_FILE:
            return None
        return entry if generation in (None, entry.generation) else None

    def read(
        self, name: str, *, generation: int | None = None, start: int | None = None, end: int | None = None
    ) -> bytes:
        try:
            with self._path(name).open("rb") as file:
                if generation not in (None, os.fstat(file.fileno()).st_mtime_ns):
                    raise self._absent(name, generation)
                if start is None and end is None:
                    entry = self._entry(name, file)
                    data = file.read()
                    self._refuse_damage(entry, len(data), google_crc32c.Checksum(data))
                    return data
                file.seek(start or 0)
                return file.read() if end is None else file.read(max(end - (start or 0), 0))
        except _NO_FILE:
            raise self._absent(name, generation) from None

    def put(
        self,
        name: str,
        open_source: Callable[[], IO[bytes]],
        *,
        size: int,
        checksum: str,
        if_generation: int | None = None,
    ) -> Entry:
        try:
            with open_source() as source:
                return self._put(name, source, (size, checksum), if_generation)
        except OSError as error:
            raise StorageUnavailable(f"{self.address(name)}: {error.strerror or error}") from error

    def sweep(self) -> None:
        with self._locked():
            for path in self._own.glob("*.tmp"):
                with path.open("rb") as file:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:  # its writer lives
                        continue
                    path.unlink(missing_ok=True)

    def delete(self, name: str, *, if_generation: int | None = None) -> None:
        path = self._path(name)
        with self._locked():
            present = self._generation(name)
            if not present:
                return
            if if_generation not in (None, present):
                raise self._in_the_way(name, if_generation)
            path.unlink()
            self._record(name).unlink(missing_ok=True)
            sync_folder(path.parent)
            for folder in path.parents:
                if folder == self._root or any(folder.iterdir()):
                    break
                folder.rmdir()

    def _entry(self, name: str, file: BinaryIO) -> Entry:
        """Of the open file, whatever may take its name meanwhile; the file stands at its beginning, and will again."""
        facts = os.fstat(file.fileno())
        try:
            record = read_json(self._record(name))
        except (FileNotFoundError, ValueError):
            record = {}
        if record.get("generation") == facts.st_mtime_ns:
            size, checksum = record["size"], record["crc32c"]
        else:
            found = google_crc32c.Checksum()
            while chunk := file.read(_COPY_CHUNK):
                found.update(chunk)
            file.seek(0)
            size, checksum = facts.st_size, bytes(found.digest()).hex()
        return Entry(name, size, checksum, facts.st_mtime_ns, datetime.fromtimestamp(facts.st_mtime, UTC))

    def _names(self, prefix: str) -> Iterator[str]:
        for folder, folders, files in os.walk(self._root / prefix.rpartition("/")[0]):
            if Path(folder) == self._root and self.OWN in folders:
                folders.remove(self.OWN)
            names = ((Path(folder) / file).relative_to(self._root).as_posix() for file in files)
            yield from (name for name in names if name.startswith(prefix))

    def _put(self, name: str, source: IO[bytes], facts: tuple[int, str], if_generation: int | None) -> Entry:
        path = self._path(name)
        temporary = self._own / f"{uuid.uuid4().hex}.tmp"
        found = google_crc32c.Checksum()
        self._make(self._own)
        try:
            with self._unfinished(temporary) as file:
                while chunk := source.read(_COPY_CHUNK):
                    found.update(chunk)
                    file.write(chunk)
                size, checksum = file.tell(), bytes(found.digest()).hex()
                if (size, checksum) != facts:
                    raise Damaged(f"{self.address(name)}: got {size} bytes with crc32c {checksum}, expected {facts}")
                file.flush()
                os.fsync(file.fileno())
                with self._locked():
                    present = self._generation(name)
                    if if_generation not in (None, present):
                        raise self._in_the_way(name, if_generation)
                    written = max(time.time_ns(), present + 1)
                    os.utime(temporary, ns=(written, written))
                    self._make(path.parent)
                    # Read back: not every file system keeps nanoseconds. Before the object: a record of another
                    # generation counts as none.
                    record = {"generation": temporary.stat().st_mtime_ns, "size": size, "crc32c": checksum}
                    self._record(name).write_text(json.dumps(record), encoding="utf-8")
                    temporary.replace(path)
                    sync_folder(path.parent)
                    entry = self.stat(name)
        finally:
            temporary.unlink(missing_ok=True)
        assert entry is not None
        return entry

    @contextmanager
    def _unfinished(self, path: Path) -> Iterator[IO[bytes]]:
        """A new file that is locked for as long as its writer lives, which tells it from a dead one's."""
        with self._locked():
            file = path.open("xb")
            fcntl.flock(file, fcntl.LOCK_EX)
        with file:
            yield file

    def _generation(self, name: str) -> int:
        """0 where there is no object."""
        path = self._path(name)
        return path.stat().st_mtime_ns if path.is_file() else 0

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time, among threads and processes; the kernel frees a dead one's lock."""
        self._make(self._own)
        with (self._own / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make(self, folder: Path) -> None:
        """Make the folder and those above it, durably."""
        if folder.is_dir():
            return
        self._make(folder.parent)
        try:
            folder.mkdir(exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise ConfigError(f"{self.url}: {folder} cannot be made ({error.strerror}): give another folder") from error
        sync_folder(folder.parent)

    def _record(self, name: str) -> Path:
        return self._own / f"{hashlib.sha256(name.encode()).hexdigest()}.json"

    def _path(self, name: str) -> Path:
        if checked_name(name).split("/")[0] == self.OWN:
            raise ValueError(f"{name!r} is no object name: {self.OWN}/ is the store's own")
        return self._root / name
