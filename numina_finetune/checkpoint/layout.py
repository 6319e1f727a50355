"""What a checkpoint is made of in storage: names, and the two kinds of index that lead to its bytes.

::

    checkpoints/step-00000123/attempt-2/
        state/00000-00003.bin         raw bytes of host 0's shards, one after another
        accelerate/00000/…            what Accelerate saved on host 0: random states, the run's progress
        done/host-00000.json          host 0's files with their checksums, and which shard lies where in them
        MANIFEST.json                 all hosts' files (size, crc32c, generation), mesh, data key, versions
        COMMITTED                     last; names the attempt and the manifest's checksum

A file's ``blocks`` are the checksums of its successive pieces of ``block_bytes`` bytes, so that a reader who needs only
a range of it can tell whether that range is sound.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import google_crc32c

CHECKPOINTS = "checkpoints"
STATE = "state"
ACCELERATE = "accelerate"
DONE = "done"
MANIFEST = "MANIFEST.json"
COMMITTED = "COMMITTED"
FORMAT = 1
"""Raised where an older reader could not read what is written."""

_PLACE = re.compile(rf"(?:^|/){CHECKPOINTS}/step-(\d+)/attempt-(\d+)/")


@dataclass(frozen=True)
class Facts:
    """An object as the manifest lists it."""

    size: int
    crc32c: str
    generation: int

    @staticmethod
    def of(mapping: Mapping[str, Any]) -> Facts:
        return Facts(int(mapping["size"]), str(mapping["crc32c"]), int(mapping["generation"]))


@dataclass(frozen=True)
class Piece:
    """A box of a tensor: what one host wrote of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """Where a piece's bytes lie, row-major."""

    piece: Piece
    file: str
    start: int


@dataclass(frozen=True)
class BlockedFile:
    """A file of shards, with the checksums of its blocks."""

    facts: Facts
    block_bytes: int
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class HostIndex:
    """What one host wrote."""

    files: Mapping[str, BlockedFile]
    """Of shards, by name."""
    small: Mapping[str, Facts]
    """Accelerate's, by name."""
    pieces: tuple[Stored, ...]

    @property
    def all_files(self) -> dict[str, Facts]:
        return {**{name: file.facts for name, file in self.files.items()}, **self.small}

    def to_json(self) -> dict[str, Any]:
        return {
            "files": {
                name: {**vars(file.facts), "block_bytes": file.block_bytes, "blocks": file.blocks}
                for name, file in self.files.items()
            },
            "small": {name: vars(facts) for name, facts in self.small.items()},
            "pieces": [
                [s.piece.name, s.piece.dtype, s.piece.shape, s.piece.offsets, s.piece.sizes, s.file, s.start]
                for s in self.pieces
            ],
        }

    @staticmethod
    def of(mapping: Mapping[str, Any]) -> HostIndex:
        return HostIndex(
            {
                name: BlockedFile(Facts.of(file), int(file["block_bytes"]), tuple(file["blocks"]))
                for name, file in mapping["files"].items()
            },
            {name: Facts.of(facts) for name, facts in mapping["small"].items()},
            tuple(
                Stored(Piece(name, dtype, tuple(shape), tuple(offsets), tuple(sizes)), file, start)
                for name, dtype, shape, offsets, sizes, file, start in mapping["pieces"]
            ),
        )


def prefix_of(step: int, attempt: int) -> str:
    """Of everything that belongs to one checkpoint, the final ``/`` included."""
    return f"{CHECKPOINTS}/step-{step:08d}/attempt-{attempt}/"


def place_of(name: str) -> tuple[int, int] | None:
    """Step and attempt of the checkpoint that an object (or a folder, with its final ``/``) belongs to."""
    found = _PLACE.search(name)
    return (int(found[1]), int(found[2])) if found else None


def done_name(host: int) -> str:
    return f"{DONE}/host-{host:05d}.json"


def checksum(data: bytes) -> str:
    """CRC-32C, eight hexadecimal digits."""
    return bytes(google_crc32c.Checksum(data).digest()).hex()


def marker_text(attempt: int, manifest: Facts) -> str:
    """The content of ``COMMITTED``: one line, and its own checksum."""
    line = json.dumps({"attempt": attempt, "manifest": vars(manifest)})
    return f"{line}\n{checksum(line.encode())}\n"


def read_marker(text: str) -> tuple[int, Facts]:
    """The inverse of `marker_text`.

    Raises:
        ValueError: it is not as it was written.
    """
    line, newline, rest = text.partition("\n")
    if not newline or rest != f"{checksum(line.encode())}\n":
        raise ValueError("it does not have its own checksum")
    marker = json.loads(line)
    return int(marker["attempt"]), Facts.of(marker["manifest"])
