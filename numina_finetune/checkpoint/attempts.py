"""One place for each life of a run, with what became of it."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

from numina_finetune.checkpoint.layout import CHECKPOINTS, place_of
from numina_finetune.errors import ConfigError
from numina_finetune.storage import PreconditionFailed, StorageError, Store

logger = logging.getLogger(__name__)

ATTEMPTS = "attempts"
STARTED = "started.json"
OUTCOME = "outcome.json"


@dataclass(frozen=True)
class Attempt:
    """One life of a run: ``attempts/{number}/``."""

    number: int
    store: Store
    process_index: int = 0

    def finish(
        self,
        kind: str,
        *,
        step: int | None,
        saved_step: int | None,
        reason: str,
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        """Write ``outcome.json``, which supervisors believe before any exit code.

        Where storage itself is what failed, that is said and not raised: the caller's own fault must be heard.

        Args:
            kind: ``done``, ``preempted``, ``stopped``, ``crashed``, ``configuration`` or ``diverged``.
            step: finished optimizer steps, None where training never began.
            saved_step: of the newest committed checkpoint that this life knows, None where it knows none.
            seconds: that this life spent on other things than steps, by what they were.
        """
        name = OUTCOME if self.process_index == 0 else f"outcome.process-{self.process_index}.json"
        outcome = {
            "kind": kind,
            "step": step,
            "saved_step": saved_step,
            "reason": reason,
            "seconds": {name: round(value, 3) for name, value in (seconds or {}).items()},
            "host": socket.gethostname(),
            "process": self.process_index,
            "time": time.time(),
        }
        try:
            self.store.write_json(f"{ATTEMPTS}/{self.number}/{name}", outcome)
        except (StorageError, ConfigError) as error:
            logger.warning("what became of this life could not be recorded: %s", error)


def attempt_numbers(store: Store) -> list[int]:
    """Of the lives that have begun."""
    parts = (name.split("/") for name in store.names(f"{ATTEMPTS}/"))
    return sorted({int(part[1]) for part in parts if part[1].isdecimal()})


def open_attempt(store: Store) -> Attempt:
    """Claim the next number; exactly one process gets it."""
    saved = (place_of(name) for name in store.names(f"{CHECKPOINTS}/"))
    number = max([0, *attempt_numbers(store), *(place[1] for place in saved if place)]) + 1
    while True:
        started = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
        try:
            store.write_json(f"{ATTEMPTS}/{number}/{STARTED}", started, if_generation=0)
        except PreconditionFailed:
            number += 1
            continue
        return Attempt(number, store)
