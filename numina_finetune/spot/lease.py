"""One supervisor a run: a lease in the run's place, taken by a precondition and renewed."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from numina_finetune.spot.clock import Clock
from numina_finetune.storage import NotFound, PreconditionFailed, Store

LEASE = "spot/lease.json"
LEASE_SECONDS = 900.0
"""Longer than any call to the cloud, so that a lease does not end during one."""


class LeaseHeld(Exception):
    """Another supervisor works on this run; the message says which."""


class LeaseLost(Exception):
    """Another supervisor has taken over; this one must not touch anything more."""


@dataclass(frozen=True)
class Holder:
    name: str
    host: str
    process: int
    born: str
    """When the process started, as the kernel counts: a later process may have its number."""
    renewed: float

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"


class Lease:
    """The right to supervise one run."""

    def __init__(self, store: Store, clock: Clock, *, seconds: float = LEASE_SECONDS) -> None:
        self._store, self._clock, self._seconds = store, clock, seconds
        self._me = uuid.uuid4().hex
        self._generation = 0
        self._renewed = 0.0

    def take(self) -> None:
        """Raises: LeaseHeld: by another supervisor that lives, or whose lease has not ended."""
        found = read_holder(self._store)
        generation = 0
        if found is not None:
            holder, generation = found
            ends = holder.renewed + self._seconds
            if self._clock.now() < ends and not _is_dead(holder):
                raise LeaseHeld(
                    f"{self._store.url} is supervised by {holder} (last heard of "
                    f"{self._clock.now() - holder.renewed:.0f} s ago): stop that one, or wait {self._seconds:.0f} s "
                    "after its death"
                )
        try:
            self._write(generation)
        except PreconditionFailed:
            raise LeaseHeld(f"{self._store.url}: another supervisor was faster to take the lease") from None

    def keep(self) -> None:
        """Renew it if a third of its time is over.

        Raises:
            LeaseLost: it is another's by now.
        """
        if self._clock.now() < self._renewed + self._seconds / 3:
            return
        try:
            self._write(self._generation)
        except PreconditionFailed:
            self.lost()

    def lost(self) -> NoReturn:
        """Raises: LeaseLost."""
        raise LeaseLost(f"{self._store.url}: another supervisor has taken over; this one ends") from None

    def give_back(self) -> None:
        """Let the next supervisor begin at once."""
        with contextlib.suppress(PreconditionFailed):
            self._store.delete(LEASE, if_generation=self._generation)

    def _write(self, generation: int) -> None:
        now = self._clock.now()
        holder = Holder(self._me, socket.gethostname(), os.getpid(), _born(os.getpid()), now)
        data = json.dumps(vars(holder)).encode()
        self._generation = self._store.write(LEASE, data, if_generation=generation).generation
        self._renewed = now


def read_holder(store: Store) -> tuple[Holder, int] | None:
    """Who holds the lease, and the lease's generation; None where nobody does."""
    entry = store.stat(LEASE)
    if entry is None:
        return None
    try:
        values: dict[str, Any] = json.loads(store.read(LEASE, generation=entry.generation))
    except NotFound:
        return read_holder(store)
    return Holder(**values), entry.generation


def _is_dead(holder: Holder) -> bool:
    """Whether it surely is; of another host's processes nothing is known."""
    return holder.host == socket.gethostname() and _born(holder.process) != holder.born


def _born(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
