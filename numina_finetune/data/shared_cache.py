"""A cache of folders that several machines share: one builds, the others wait and copy.

In the store lie, below ``{key}/``, the builder's ``CLAIM``, the files in a folder of their builder's own, and last
``COMMITTED``, which lists the files with size, crc32c and generation. Only what ``COMMITTED`` lists exists for a
reader. A claim lives as long as its builder rewrites it; one that stands still is taken over. It only spares work:
should two builders be at it after all, the first to commit provides the folder, and the other takes it from there.
"""

from __future__ import annotations

import json
import logging
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from numina_finetune.errors import ConfigError, DataError
from numina_finetune.storage import (
    Damaged,
    NotFound,
    PreconditionFailed,
    StorageError,
    Store,
    checked_name,
    move_unless_there,
    open_store,
)

logger = logging.getLogger(__name__)

CLAIM = "CLAIM"
COMMITTED = "COMMITTED"
_TRANSFERS = 8
"""Files on their way at the same time."""


@dataclass(frozen=True)
class CachedFile:
    """One line of ``COMMITTED``."""

    path: str
    """In the folder."""
    object: str
    """In the store."""
    size: int
    crc32c: str
    generation: int


def fetch_or_build(
    store_url: str,
    key: str,
    local: Path,
    build: Callable[[Path], None],
    *,
    poll_seconds: float = 2.0,
    claim_seconds: float = 120.0,
) -> Path:
    """The folder ``local/key``: as it is, else from the store, else built here and put into the store.

    Args:
        build: writes the folder, at a path where nothing is yet.
        poll_seconds: between two looks at another's build.
        claim_seconds: after so long without a sign of life a builder counts as dead. It gives one three times as
            often.

    Raises:
        DataError: what the store has is damaged.
        ConfigError: the store cannot be used.
        StorageError: network or server faults that lasted.
        Whatever ``build`` raises; another process may then try.
    """
    folder = local / key
    if folder.is_dir():
        return folder
    store = open_store(store_url)
    local.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=local))
    try:
        claim = _wait_or_claim(store, key, poll_seconds, claim_seconds)
        provided = False
        if claim:
            with claim.kept_alive():
                build(working / "folder")
                provided = _provide(store, key, working / "folder", claim.token)
        if not provided:
            shutil.rmtree(working / "folder", ignore_errors=True)
            _fetch(store, key, working / "folder")
        move_unless_there(working / "folder", folder)
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return folder


class _Claim:
    """The word to the others that this process builds."""

    def __init__(self, store: Store, key: str, seconds: float) -> None:
        self.token = uuid.uuid4().hex
        self._store, self._name, self._seconds = store, f"{key}/{CLAIM}", seconds
        self._generation = 0
        self._released = threading.Event()

    def make(self, replaced: int) -> bool:
        """Whether the claim is made; ``replaced`` is the generation of the one it takes over, 0 for none."""
        facts = {"token": self.token, "host": socket.gethostname(), "time": time.time()}
        try:
            data = json.dumps(facts).encode()
            self._generation = self._store.write(self._name, data, if_generation=replaced).generation
        except PreconditionFailed:
            return False
        return True

    @contextmanager
    def kept_alive(self) -> Iterator[None]:
        """Rewrites the claim from time to time; gives it up at the end, however that comes."""
        thread = threading.Thread(target=self._beat, name="cache-claim", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._released.set()
            thread.join()
            self.give_up()

    def give_up(self) -> None:
        try:
            self._store.delete(self._name, if_generation=self._generation)
        except PreconditionFailed:
            pass  # another's by now
        except StorageError as error:
            logger.warning("the claim could not be given up, others will wait for it to grow old: %s", error)

    def _beat(self) -> None:
        while not self._released.wait(self._seconds / 3):
            try:
                if not self.make(self._generation):
                    logger.warning("%s was taken over by another process", self._store.address(self._name))
                    return
            except (StorageError, ConfigError) as error:
                logger.warning("the claim could not be renewed: %s", error)


def _wait_or_claim(store: Store, key: str, poll_seconds: float, claim_seconds: float) -> _Claim | None:
    """The claim once it is this process's to build; None once the folder is in the store."""
    claim = _Claim(store, key, claim_seconds)
    seen, since = -1, 0.0
    while store.stat(f"{key}/{COMMITTED}") is None:
        # A claim's age is measured between an answer and a later question, on this process's clock alone.
        asked = time.monotonic()
        holder = store.stat(f"{key}/{CLAIM}")
        generation = holder.generation if holder else 0
        if generation != seen:
            if generation and seen <= 0:
                logger.info("waiting for another process to build %s", store.address(key))
            seen, since = generation, time.monotonic()
        if generation and asked - since < claim_seconds:
            time.sleep(poll_seconds)
        elif claim.make(generation):
            if store.stat(f"{key}/{COMMITTED}") is None:
                return claim
            # The builder before committed and left between the two looks.
            claim.give_up()
    return None


def _provide(store: Store, key: str, built: Path, token: str) -> bool:
    """Put the built folder into the store; False where another's is there."""
    if store.stat(f"{key}/{COMMITTED}"):
        return False
    paths = sorted(path for path in built.rglob("*") if path.is_file())
    if not paths:
        raise ValueError(f"the build of {key} wrote no file")

    def upload(path: Path) -> CachedFile:
        name = path.relative_to(built).as_posix()
        entry = store.upload(path, f"{key}/{token}/{name}", if_generation=0)
        return CachedFile(name, entry.name, entry.size, entry.crc32c, entry.generation)

    with ThreadPoolExecutor(_TRANSFERS) as pool:
        files = list(pool.map(upload, paths))
    manifest = {"key": key, "host": socket.gethostname(), "files": [asdict(file) for file in files]}
    try:
        store.write(f"{key}/{COMMITTED}", json.dumps(manifest, indent=1).encode(), if_generation=0)
    except PreconditionFailed:
        _remove(store, f"{key}/{token}/")
        return False
    _remove(store, f"{key}/", kept={f"{key}/{CLAIM}", f"{key}/{COMMITTED}", *(file.object for file in files)})
    return True


def _remove(store: Store, prefix: str, *, kept: Collection[str] = ()) -> None:
    """Delete what builders left that never committed; nobody reads it, so a fault here harms nothing."""
    try:
        for entry in store.list(prefix):
            if entry.name not in kept:
                store.delete(entry.name)
    except StorageError as error:
        logger.warning("leftovers of an unfinished build stay in the store: %s", error)


def _fetch(store: Store, key: str, folder: Path) -> None:
    """Copy what ``COMMITTED`` lists.

    Raises:
        DataError: an object is missing or damaged.
    """
    files = _committed(store, key)

    def download(file: CachedFile) -> str | None:
        try:
            entry = store.download(file.object, folder / file.path, generation=file.generation)
        except (NotFound, Damaged) as error:
            return str(error)
        if (entry.size, entry.crc32c) != (file.size, file.crc32c):
            return f"{store.address(file.object)} is not what {COMMITTED} lists"
        return None

    with ThreadPoolExecutor(_TRANSFERS) as pool:
        problems = [problem for problem in pool.map(download, files) if problem]
    if problems:
        raise DataError([f"{problem}: {_mend(store, key)}" for problem in problems])


def _committed(store: Store, key: str) -> list[CachedFile]:
    name = f"{key}/{COMMITTED}"
    try:
        files = [CachedFile(**facts) for facts in json.loads(store.read(name))["files"]]
        for file in files:
            checked_name(file.path)
    except (NotFound, Damaged, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{store.address(name)} is damaged ({error}): {_mend(store, key)}") from error
    return files


def _mend(store: Store, key: str) -> str:
    return f"delete {store.address(key)}/ with all that is in it, and the next run builds it anew"
