"""Saving while training goes on, and resuming from the newest checkpoint that is sound.

A save copies this host's shards to host memory at a step's end, on the main thread, where all collectives are. A
background thread stores them and confirms them with a done object; process 0's then waits for all hosts', and commits.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numina_finetune.checkpoint.commit import Policy, Save, commit, prune
from numina_finetune.checkpoint.evaluations import Evaluation, from_manifest
from numina_finetune.checkpoint.reading import Checkpoint, Unsound, none_left, say_damaged
from numina_finetune.checkpoint.state import StateDoor
from numina_finetune.checkpoint.upload import Captured, confirm_host, report_failure, upload_host
from numina_finetune.errors import ConfigError
from numina_finetune.processes import ProcessGroup
from numina_finetune.storage import Damaged, NotFound, StorageError, Store

logger = logging.getLogger(__name__)

CLOSING_PATIENCE = 25.0
"""Seconds that a run which fails leaves a save on its way, where no machine is about to go."""
_NOTICEABLE = 0.5
"""Seconds of waiting that are worth a line."""


class _GivenUp(Exception):
    """The save was told to stop."""


@dataclass(frozen=True)
class Saved:
    """What a committed save cost."""

    step: int
    stall_seconds: float
    """Seconds that training stood still."""
    total_seconds: float
    """From its beginning to the commit."""
    bytes: int
    """Of all hosts' files."""


class CheckpointManager:
    """Saves, commits and prunes the checkpoints of one life of a run; at most one save is on its way."""

    def __init__(
        self,
        store: Store,
        attempt: int,
        door: StateDoor,
        processes: ProcessGroup,
        *,
        hosts: int,
        keep: int,
        facts: Mapping[str, Any],
        asynchronous: bool = True,
        remaining: Callable[[], float | None] = lambda: None,
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            store: the run's place.
            hosts: processes that write.
            keep: committed checkpoints that stay; the best by evaluation besides.
            facts: what the manifest says besides the files: mesh, data key, versions.
            remaining: seconds until the machine goes, None where none is known.
            before_commit: called on process 0 in the background, for what must be durable with the checkpoint.
        """
        self._store, self._attempt, self._door, self._processes = store, attempt, door, processes
        self._hosts, self._keep, self._facts = hosts, keep, dict(facts)
        self._asynchronous, self._remaining, self._before_commit = asynchronous, remaining, before_commit
        self._evaluations: dict[int, Evaluation] = {}
        self._flight: _Flight | None = None
        self._saved: list[Saved] = []
        self.committed_step: int | None = None
        """Of the newest checkpoint that is known to be committed."""
        self.seconds = {"save": 0.0, "restore": 0.0}
        """That training stood still for committed saves, and that the restoring of the state took."""

    @property
    def busy(self) -> bool:
        """Whether a save is on its way."""
        return self._flight is not None and not self._flight.wait(0)

    @property
    def newest_committed(self) -> int | None:
        """As ``committed_step``, but on process 0 known the moment it happens: not the same on all processes."""
        flight = self._flight
        return flight.save.step if flight is not None and flight.committed else self.committed_step

    def save(self, step: int, *, wait: bool = False) -> bool:
        """Begin to save the present state, after the save before has ended. Collective.

        Args:
            wait: return when it is committed.

        Returns:
            False where the machine's grace ended first: the checkpoint before is then the newest.

        Raises:
            StorageError, ConfigError: this save or the one before could not be stored.
        """
        began = time.monotonic()
        if not self.finish() or self._processes.any(self._is_late()):
            return False
        captured = self._door.capture()
        policy = Policy(self._facts, dict(self._evaluations), self._keep, self._before_commit)
        save = Save(self._store, step, self._attempt, self._hosts)
        host = self._processes.index
        self._flight = _Flight(save, host, captured, began, policy if host == 0 else None)
        self._flight.start()
        if wait or not self._asynchronous:
            return self.finish()
        self._flight.stall = time.monotonic() - began
        return True

    def finish(self) -> bool:
        """Wait for the save on its way, if there is one. Collective.

        Returns:
            False where the machine's grace ended first.

        Raises:
            StorageError, ConfigError: it could not be stored, on this host or another.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return True
        began = time.monotonic()
        while not flight.wait(0.1):
            if self._is_late():
                flight.give_up()
                break
        waited = time.monotonic() - began
        if waited > _NOTICEABLE and flight.stall is not None:
            logger.info("waited %.1f s for the checkpoint of step %d to be stored", waited, flight.save.step)
        error = None if flight.committed else flight.error
        ends = self._processes.gather((flight.committed, f"{error}" if error else None))
        if ends[0][0]:
            self._note(flight)
            return True
        if failed := [index for index, (_, reason) in enumerate(ends) if reason]:
            what = f"the checkpoint of step {flight.save.step} could not be saved"
            if isinstance(error, ConfigError):
                raise ConfigError(f"{what}: {error}") from error
            where = "" if error else f" by process {failed[0]}"
            raise StorageError(f"{what}{where}: {error or ends[failed[0]][1]}") from error
        logger.warning(
            "the checkpoint of step %d was given up: the time left was too short to store it", flight.save.step
        )
        return False

    def close(self, patience: float = CLOSING_PATIENCE) -> None:
        """Leave nothing on its way behind, whatever ended the run: wait a little, then give up."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        left = self._remaining()
        if not flight.wait(patience if left is None else min(left, patience)):
            flight.give_up()
            logger.warning("the checkpoint of step %d was given up: it was not stored yet", flight.save.step)
        elif flight.error:
            logger.error("the checkpoint of step %d could not be saved: %s", flight.save.step, flight.error)

    def load(self, candidates: Sequence[Checkpoint]) -> Checkpoint:
        """Restore the state in place from the first candidate that is sound, on all processes the same. Collective.

        Raises:
            CheckpointError: none is sound, or the state is not of this model.
        """
        began = time.monotonic()
        damage: list[str] = []
        for checkpoint in candidates:
            fault = self._try(checkpoint)
            faults = [fault for fault in self._processes.gather(fault) if fault]
            if not faults:
                self.committed_step = checkpoint.step
                self.seconds["restore"] = time.monotonic() - began
                return checkpoint
            say_damaged(checkpoint, faults[0])
            damage += faults
        raise none_left(candidates[0], damage)

    def note_evaluation(self, step: int, loss: float | None, accuracy: float | None = None) -> None:
        """How good the state after ``step`` is: of the checkpoints that are evaluated, the best one stays."""
        self._evaluations[step] = Evaluation(loss, accuracy)

    def drain(self) -> list[Saved]:
        """What the saves committed since the last time cost."""
        saved, self._saved = self._saved, []
        return saved

    def _try(self, checkpoint: Checkpoint) -> str | None:
        """What is wrong with the checkpoint; None where the state has been restored from it."""
        try:
            opened = checkpoint.open()
            self._door.restore(opened.shards(), opened.small(self._processes.index))
        except Unsound as error:
            return error.faults[0]
        except (Damaged, NotFound) as error:
            return f"{error}"
        self._evaluations = from_manifest(opened.manifest)
        return None

    def _note(self, flight: _Flight) -> None:
        save, now = flight.save, time.monotonic()
        stall = now - flight.began if flight.stall is None else flight.stall
        total = (flight.ended or now) - flight.began
        self.committed_step = save.step
        self.seconds["save"] += stall
        self._saved.append(Saved(save.step, stall, total, flight.stored))

    def _is_late(self) -> bool:
        left = self._remaining()
        return left is not None and left <= 0


class _Flight:
    """One save on its way, on a thread of its own."""

    def __init__(
        self,
        save: Save,
        host: int,
        captured: Captured,
        began: float,
        policy: Policy | None,
    ) -> None:
        """``policy``: only process 0's, which commits."""
        self.save, self.began = save, began
        self.stall: float | None = None
        self.ended: float | None = None
        """When it was committed, or on other processes than 0, when this host's part was stored."""
        self.stored = captured.bytes
        self.error: Exception | None = None
        self.committed = False
        self._host, self._captured, self._policy = host, captured, policy
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="checkpoint-save")

    def start(self) -> None:
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, in one way or the other."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def give_up(self) -> None:
        """Begin nothing more; a request under way is left to itself."""
        self._stop.set()

    def _run(self) -> None:
        try:
            index = upload_host(self.save.store, self.save.prefix, self._host, self._captured, go_on=self._go_on)
            confirm_host(self.save.store, self.save.prefix, self._host, index)
            if self._policy:
                self.stored = commit(self.save, self._policy, self._go_on)
            self.ended, self.committed = time.monotonic(), True
            if self._policy:
                total = self.ended - self.began
                stall = total if self.stall is None else self.stall
                logger.info(
                    "checkpoint of step %d committed: %.2f GB in %.1f s, of which training stood still for %.2f s",
                    *(self.save.step, self.stored / 1e9, total, stall),
                )
        except _GivenUp:
            return
        except Exception as error:
            self.error = error
            self._tell_others(error)
            return
        if self._policy:
            self._clean(self._policy)

    def _tell_others(self, error: Exception) -> None:
        try:
            report_failure(self.save.store, self.save.prefix, self._host, error)
        except Exception as second:  # storage is what failed, most likely: the others' patience will end
            logger.debug("the failure could not be reported: %s", second)

    def _clean(self, policy: Policy) -> None:
        try:
            prune(self.save, policy)
        except (StorageError, ConfigError) as error:
            logger.warning("old checkpoints could not be deleted: %s", error)

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise _GivenUp
