"""Local files that are whole or absent: atomic writes, durable on return, and checksums."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import google_crc32c

_CHUNK = 1 << 22


def write_text(path: Path, text: str) -> None:
    """Write ``path`` so that a reader sees the old content or all of the new, even after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable; a renamed file may otherwise be lost with the folder's old list."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make a file's content durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def crc32c(path: Path) -> str:
    """CRC-32C of a file's content, eight hexadecimal digits: the checksum that Cloud Storage keeps."""
    checksum = google_crc32c.Checksum()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            checksum.update(chunk)
    return bytes(checksum.digest()).hex()


def remove_folder(folder: Path) -> None:
    """Delete a folder and what is in it; one that is already gone is fine."""
    shutil.rmtree(folder, ignore_errors=True)


def move_unless_there(built: Path, folder: Path) -> None:
    """Give a finished folder its name, durably; where another process was faster, its folder stays."""
    for below in [path for path in built.rglob("*") if path.is_dir()]:
        sync_folder(below)
    sync_folder(built)
    try:
        built.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    sync_folder(folder.parent)


def user_cache() -> Path:
    """The folder for what can be made or fetched again, where no other is named."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "numina_finetune"
