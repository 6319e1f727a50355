"""Which checkpoints exist: a folder without its commit marker does not.

``checkpoints/step-00000123/attempt-2/`` holds the shards, then ``MANIFEST.json`` (every file with size and crc32c),
then, last and atomically, ``COMMITTED``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numina_finetune import storage
from numina_finetune.checkpoint.state import StateOwner
from numina_finetune.errors import CheckpointError

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
MANIFEST = "MANIFEST.json"
COMMITTED = "COMMITTED"


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    step: int
    attempt: int
    folder: Path

    @property
    def manifest(self) -> dict[str, Any]:
        manifest: dict[str, Any] = storage.read_json(self.folder / MANIFEST)
        return manifest


def committed(run: Path) -> list[Checkpoint]:
    """The run's committed checkpoints, newest first (by step, then by attempt)."""
    found = [
        Checkpoint(
            int(marker.parts[-3].removeprefix("step-")), int(marker.parts[-2].removeprefix("attempt-")), marker.parent
        )
        for marker in (run / CHECKPOINTS).glob(f"step-*/attempt-*/{COMMITTED}")
    ]
    return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.attempt), reverse=True)


def faults_of(checkpoint: Checkpoint) -> list[str]:
    """What differs between the files and the manifest: nothing, in a sound checkpoint."""
    try:
        files: Mapping[str, Any] = checkpoint.manifest["files"]
    except (OSError, ValueError, KeyError) as error:
        return [f"{checkpoint.folder / MANIFEST} cannot be read: {error}"]
    return [fault for name, facts in files.items() for fault in _file_faults(checkpoint.folder / name, facts)]


def newest_sound(run: Path, wanted_step: int | None = None) -> Checkpoint | None:
    """The newest committed checkpoint whose files are what they were; None where there is none at all.

    Args:
        wanted_step: only this step counts.

    Raises:
        CheckpointError: the wanted step is not there, or every checkpoint is damaged.
    """
    candidates = [c for c in committed(run) if wanted_step is None or c.step == wanted_step]
    if wanted_step is not None and not candidates:
        steps = sorted({c.step for c in committed(run)})
        raise CheckpointError(
            f"--resume-from-checkpoint {wanted_step}: no such committed checkpoint in {run}: "
            f"there are steps {', '.join(map(str, steps)) or '(none)'}"
        )
    damage: list[str] = []
    for checkpoint in candidates:
        faults = faults_of(checkpoint)
        if not faults:
            return checkpoint
        logger.warning(
            "checkpoint of step %d is damaged, falling back to the one before: %s", checkpoint.step, faults[0]
        )
        damage += faults
    if damage:
        raise CheckpointError([*damage, f"no sound checkpoint is left in {run}: move that folder away to start anew"])
    return None


class CheckpointManager:
    """Saves, commits and prunes the checkpoints of one life of a run."""

    def __init__(self, run: Path, attempt: int, owner: StateOwner, *, keep: int, facts: Mapping[str, Any]) -> None:
        """
        Args:
            keep: committed checkpoints that stay.
            facts: what the manifest says besides the files: mesh, data key, versions.
        """
        self._run, self._attempt, self._owner = run, attempt, owner
        self._keep, self._facts = keep, dict(facts)

    def save(self, step: int) -> Checkpoint:
        """Save and commit the present state; on return it is durable."""
        started = time.monotonic()
        folder = self._run / CHECKPOINTS / f"step-{step:08d}" / f"attempt-{self._attempt}"
        self._owner.accelerator.save_state(str(folder))
        self._owner.processes.barrier()
        checkpoint = Checkpoint(step, self._attempt, folder)
        if self._owner.process_index == 0:
            _commit(checkpoint, self._facts)
            self._prune(checkpoint)
        self._owner.processes.barrier()
        logger.info("checkpoint of step %d committed in %.1f s", step, time.monotonic() - started)
        return checkpoint

    def load(self, checkpoint: Checkpoint) -> None:
        """Restore the state in place."""
        self._owner.accelerator.load_state(str(checkpoint.folder))

    def _prune(self, newest: Checkpoint) -> None:
        """Drop the oldest beyond the limit, and this run's leftovers that were never committed.

        The one just committed stays in any case: after a resume from an earlier step, others may have a later one.
        """
        others = [checkpoint for checkpoint in committed(self._run) if checkpoint != newest]
        kept = {checkpoint.folder for checkpoint in [newest, *others[: self._keep - 1]]}
        for folder in (self._run / CHECKPOINTS).glob("step-*/attempt-*"):
            if folder in kept:
                continue
            # The marker goes first: a half-deleted checkpoint must not look committed.
            (folder / COMMITTED).unlink(missing_ok=True)
            storage.remove_folder(folder)
        for folder in (self._run / CHECKPOINTS).glob("step-*"):
            if not any(folder.iterdir()):
                folder.rmdir()


def _commit(checkpoint: Checkpoint, facts: Mapping[str, Any]) -> None:
    files = {}
    for path in _files_below(checkpoint.folder):
        storage.sync_file(path)
        files[str(path.relative_to(checkpoint.folder))] = {"size": path.stat().st_size, "crc32c": storage.crc32c(path)}
    for folder in {path.parent for path in _files_below(checkpoint.folder)} | {checkpoint.folder.parent}:
        storage.sync_folder(folder)
    manifest = {"step": checkpoint.step, "attempt": checkpoint.attempt, **facts, "files": files}
    storage.write_json(checkpoint.folder / MANIFEST, manifest)
    storage.write_text(checkpoint.folder / COMMITTED, f"attempt {checkpoint.attempt}\n")


def _files_below(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (MANIFEST, COMMITTED))


def _file_faults(path: Path, facts: Mapping[str, Any]) -> list[str]:
    if not path.is_file():
        return [f"{path} is missing"]
    if path.stat().st_size != facts["size"]:
        return [f"{path} has {path.stat().st_size} bytes, the manifest says {facts['size']}"]
    checksum = storage.crc32c(path)
    return [] if checksum == facts["crc32c"] else [f"{path} has crc32c {checksum}, the manifest says {facts['crc32c']}"]
