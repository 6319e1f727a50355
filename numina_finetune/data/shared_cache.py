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
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from numina_finetune.claims import Claim
from numina_finetune.errors import DataError
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
        claim = Claim(store, f"{key}/{CLAIM}", claim_seconds)
        provided = False
        if claim.take_unless(lambda: store.stat(f"{key}/{COMMITTED}") is not None, poll_seconds):
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
