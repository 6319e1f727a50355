"""One folder for each life of a run, with what became of it."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from numina_finetune import storage

ATTEMPTS = "attempts"
OUTCOME = "outcome.json"


@dataclass(frozen=True)
class Attempt:
    """One life of a run: ``attempts/{number}/``."""

    number: int
    folder: Path
    process_index: int = 0

    def finish(self, kind: str, *, step: int | None, reason: str) -> None:
        """Write ``outcome.json``, which supervisors believe before any exit code.

        Args:
            kind: ``done``, ``preempted``, ``stopped``, ``crashed`` or ``configuration``.
            step: finished optimizer steps, None where training never began.
        """
        name = OUTCOME if self.process_index == 0 else f"outcome.process-{self.process_index}.json"
        storage.write_json(
            self.folder / name,
            {
                "kind": kind,
                "step": step,
                "reason": reason,
                "host": socket.gethostname(),
                "process": self.process_index,
                "time": time.time(),
            },
        )


def open_attempt(run: Path) -> Attempt:
    """Claim the next number; a folder is made by exactly one process."""
    attempts = run / ATTEMPTS
    attempts.mkdir(parents=True, exist_ok=True)
    number = max((int(path.name) for path in attempts.iterdir() if path.name.isdigit()), default=0) + 1
    while True:
        try:
            (attempts / str(number)).mkdir()
        except FileExistsError:
            number += 1
            continue
        storage.write_json(
            attempts / str(number) / "started.json",
            {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()},
        )
        return Attempt(number, attempts / str(number))
