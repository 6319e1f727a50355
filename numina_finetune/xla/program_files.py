"""Compiled programs as files: in a folder of this machine, and with the run, where the next machine finds them."""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from numina_finetune.errors import UserError
from numina_finetune.files import user_cache
from numina_finetune.storage import NotFound, StorageError, Store, open_store

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
FOLDER = "programs"
MACHINE_BYTES = 8 << 30
"""What the machine's folder may hold; the oldest go first."""
_HEAD = b"numina program 1\n"
_FAULTS = (StorageError, UserError, OSError)
_RETRY_SECONDS = 10.0
"""A program that storage does not give by then is compiled, which is what there is to lose."""


class ProgramFiles:
    """Programs by name; what storage fails to do is told once and costs a compilation, never the run."""

    def __init__(self, stores: Sequence[Store], written: Sequence[Store], process: int) -> None:
        """
        Args:
            stores: where to look, the nearest first; the last one keeps the marks of what is being tried.
            written: those of them that take what this process compiled.
            process: its number within the run.
        """
        self._stores, self._written, self._process = stores, written, process
        self._told = False
        self._names = {store.url: self._listed(store) for store in stores}
        self._waiting: queue.Queue[Callable[[], None]] = queue.Queue()
        self._writer: threading.Thread | None = None

    def find(self, name: str) -> bytes | None:
        """The program of that name, None where there is none or not whole."""
        for store in self._stores:
            if _path(name) not in self._names[store.url]:
                continue
            data = self._read(store, name)
            if data is not None:
                if store is not self._stores[0] and self._stores[0] in self._written:
                    self._later(partial(self._write, self._stores[0], name, data))
                return data
        return None

    def keep(self, name: str, data: bytes) -> None:
        """Store a program, in the background."""
        for store in self._written:
            self._later(partial(self._write, store, name, data))

    def forget(self, name: str) -> None:
        """Delete a program that is not what it should be."""
        for store in self._stores:
            self._names[store.url].discard(_path(name))
            self._guarded(partial(store.delete, _path(name)))

    @contextmanager
    def trying(self, name: str) -> Iterator[bool]:
        """Leave a mark for as long as the runtime reads the program.

        Gives False where an earlier life's mark is there still: that life ended within.
        """
        store, mark = self._stores[-1], f"{FOLDER}/trying/{name}-{self._process}"
        if mark in self._names[store.url]:
            self._names[store.url].discard(mark)
            yield False
        else:
            self._guarded(lambda: store.write(mark, b""))
            yield True
        self._guarded(lambda: store.delete(mark))

    def settle(self, seconds: float) -> None:
        """Wait for what is being stored, at most so long."""
        with self._waiting.all_tasks_done:
            self._waiting.all_tasks_done.wait_for(lambda: not self._waiting.unfinished_tasks, seconds)

    def _listed(self, store: Store) -> set[str]:
        return set(self._guarded(lambda: store.names(f"{FOLDER}/")) or ())

    def _read(self, store: Store, name: str) -> bytes | None:
        try:
            return unpacked(store.read(_path(name)))
        except NotFound:
            return None
        except (ValueError, zlib.error):
            logger.warning("%s is damaged: deleted, and compiled anew", store.address(_path(name)))
            self.forget(name)
        except _FAULTS as error:
            self._tell(error)
        return None

    def _write(self, store: Store, name: str, data: bytes) -> None:
        store.write(_path(name), packed(data))
        if store is self._stores[0]:
            _shrink(store)

    def _later(self, work: Callable[[], None]) -> None:
        self._waiting.put(work)
        if self._writer is None:
            self._writer = threading.Thread(target=self._store_all, name="programs", daemon=True)
            self._writer.start()

    def _store_all(self) -> None:
        while True:
            self._guarded(self._waiting.get())
            self._waiting.task_done()

    def _guarded(self, work: Callable[[], _T]) -> _T | None:
        try:
            return work()
        except _FAULTS as error:
            self._tell(error)
        return None

    def _tell(self, error: Exception) -> None:
        if not self._told:
            logger.warning("compiled programs cannot be kept for the next attempt: %s", error)
        self._told = True


def open_files(run_url: str | None, process: int) -> ProgramFiles:
    """The files of a run's process: all write into their machine's folder, the first into the run's place too."""
    stores = [open_store(user_cache())]
    written = list(stores)
    if run_url is not None:
        stores.append(open_store(run_url, retry_seconds=_RETRY_SECONDS))
        written += stores[1:] if process == 0 else []
    return ProgramFiles(stores, written, process)


def _path(name: str) -> str:
    return f"{FOLDER}/{name}"


def packed(data: bytes) -> bytes:
    return _HEAD + hashlib.sha256(data).digest() + zlib.compress(data, 1)


def unpacked(stored: bytes) -> bytes:
    """Raises ValueError or zlib.error where it is not what `packed` made."""
    body = stored.removeprefix(_HEAD)
    data = zlib.decompress(body[32:])
    if body is stored or hashlib.sha256(data).digest() != body[:32]:
        raise ValueError("not a stored program")
    return data


def _shrink(store: Store) -> None:
    entries = sorted(store.list(f"{FOLDER}/"), key=lambda entry: entry.updated, reverse=True)
    total = 0
    for entry in entries:
        total += entry.size
        if total > MACHINE_BYTES:
            store.delete(entry.name)
