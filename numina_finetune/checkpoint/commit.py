"""What makes uploaded files a checkpoint, and which checkpoints stay: the work of one process for all."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from numina_finetune.checkpoint.attempts import attempt_numbers
from numina_finetune.checkpoint.evaluations import Evaluations, best_of, to_manifest
from numina_finetune.checkpoint.layout import (
    CHECKPOINTS,
    COMMITTED,
    FORMAT,
    MANIFEST,
    Facts,
    HostIndex,
    done_name,
    marker_text,
    place_of,
    prefix_of,
)
from numina_finetune.checkpoint.parallel import in_order
from numina_finetune.storage import StorageError, Store

HOSTS_PATIENCE = 900.0
"""Seconds that the slowest host may take longer for its files than process 0."""
_POLL = (0.05, 1.0)
"""Seconds between two looks for the hosts' done objects: at first, and at most."""
_DELETIONS = 8


@dataclass(frozen=True)
class Save:
    """One checkpoint in the making."""

    store: Store
    step: int
    attempt: int
    hosts: int

    @property
    def prefix(self) -> str:
        return prefix_of(self.step, self.attempt)


@dataclass(frozen=True)
class Policy:
    """What is decided besides the files."""

    facts: Mapping[str, Any]
    """What the manifest says: mesh, data key, versions."""
    evaluations: Evaluations
    keep: int
    """Committed checkpoints that stay; the best one besides."""
    before: Callable[[], None]
    """Called when all files are there, for what has to be durable no later than the checkpoint."""


def commit(save: Save, policy: Policy, go_on: Callable[[], None], patience: float = HOSTS_PATIENCE) -> int:
    """Wait for every host's files, then write the manifest, then the marker; the bytes of all files.

    Args:
        go_on: called again and again; it raises where the save is to be given up.

    Raises:
        StorageError: a host failed or is missing, or files are gone that were stored.
    """
    files: dict[str, Facts] = {}
    for host in range(save.hosts):
        files |= _files_of(save, host, go_on, patience)
    _refuse_gone(save, files)
    policy.before()
    go_on()
    manifest = {
        "format": FORMAT,
        "step": save.step,
        "attempt": save.attempt,
        "hosts": save.hosts,
        **policy.facts,
        **to_manifest(policy.evaluations),
        "files": {name: vars(file) for name, file in files.items()},
    }
    entry = save.store.write_json(save.prefix + MANIFEST, manifest, if_generation=0)
    go_on()
    marker = marker_text(save.attempt, Facts(entry.size, entry.crc32c, entry.generation))
    save.store.write(save.prefix + COMMITTED, marker.encode(), if_generation=0)
    return sum(file.size for file in files.values())


def _files_of(save: Save, host: int, go_on: Callable[[], None], patience: float) -> dict[str, Facts]:
    """The host's files and its done object, once that is there."""
    name, until, pause = save.prefix + done_name(host), time.monotonic() + patience, _POLL[0]
    while (entry := save.store.stat(name)) is None:
        go_on()
        if time.monotonic() > until:
            raise StorageError(
                f"{save.store.address(name)} did not appear within {patience:g} s: process {host} has not stored its "
                "files, see its log"
            )
        time.sleep(pause)
        pause = min(2 * pause, _POLL[1])
    done = json.loads(save.store.read(name, generation=entry.generation))
    if "error" in done:
        raise StorageError(f"process {host} could not store its files: {done['error']}")
    return {**HostIndex.of(done).all_files, done_name(host): Facts(entry.size, entry.crc32c, entry.generation)}


def _refuse_gone(save: Save, files: Mapping[str, Facts]) -> None:
    """A later attempt may have taken this one for dead and have cleaned up after it."""
    present = {entry.name: entry.generation for entry in save.store.list(save.prefix)}
    for name, file in files.items():
        if present.get(save.prefix + name) != file.generation:
            raise StorageError(
                f"{save.store.address(save.prefix + name)} was stored and is gone or another: does a later attempt of "
                "this run clean up after this one?"
            )


def prune(save: Save, policy: Policy) -> None:
    """After ``save`` was committed: drop the oldest beyond the limit, and what earlier attempts left uncommitted.

    The one just committed stays in any case: after a resume from an earlier step, others may have a later one. A
    process that lives on although a later attempt has begun touches its own checkpoints only.
    """
    store, own = save.store, save.attempt
    found: dict[tuple[int, int], list[str]] = {}
    for name in store.names(f"{CHECKPOINTS}/"):
        if place := place_of(name):
            found.setdefault(place, []).append(name)
    committed = sorted((place for place in found if prefix_of(*place) + COMMITTED in found[place]), reverse=True)
    newest = (save.step, own)
    kept = {
        newest,
        *[place for place in committed if place != newest][: policy.keep - 1],
        *best_of(committed, policy.evaluations),
    }
    newest_attempt = max(attempt_numbers(store), default=own) == own
    for place, names in found.items():
        if place not in kept and (place[1] == own or (newest_attempt and place[1] < own)):
            delete_checkpoint(store, place, names)
    store.sweep()


def delete_checkpoint(store: Store, place: tuple[int, int], names: Iterable[str]) -> None:
    """Delete all its objects. The marker goes first: a half-deleted checkpoint must not look committed."""
    marker = prefix_of(*place) + COMMITTED
    store.delete(marker)
    for _ in in_order(store.delete, [name for name in names if name != marker], threads=_DELETIONS, ahead=64):
        pass
