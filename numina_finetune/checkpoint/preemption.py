"""Notices to stop: SIGTERM and Google Cloud's metadata service from the machine, SIGINT from the user."""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from signal import Signals
from types import FrameType, TracebackType
from typing import Any

from numina_finetune.config import RunConfig
from numina_finetune.metadata import NoAnswer, Refused, Service, Value

logger = logging.getLogger(__name__)

LONG_POLL = 10
"""Seconds the metadata service holds a question about a preemption; how often maintenance is asked about."""
TRIES_AT_START = 3
"""Questions without an answer after which there is no metadata service here."""
BACK_OFF = (1.0, 5.0)
"""Seconds before asking again after an error: at first, and at most. A spot machine lives 30 after its notice."""


@dataclass(frozen=True)
class _Notice:
    reason: str
    time: float
    """On the monotonic clock."""
    signal: Signals | None = None


@dataclass(frozen=True)
class Told:
    """What one process of a run was told, for the others to take over."""

    reason: str
    by_user: bool
    remaining: float | None


class StopNotice:
    """Remembers the first notice to stop; the loop asks between two steps.

    Use as a context manager in the main thread. Later notices change nothing, except that a second SIGINT raises
    KeyboardInterrupt at once: Compute Engine says a preemption in its metadata and by SIGTERM, and that is one notice.
    """

    def __init__(self, grace: float = RunConfig.preemption_grace) -> None:
        """``grace``: seconds after a notice that a save may count on; Compute Engine gives spot machines about 30."""
        self._grace = grace
        # Signal handlers and the polling thread only ever append, which is atomic: the first one stays the first, and
        # no lock can be held by the code that a signal interrupts.
        self._notices: list[_Notice] = []
        self._interrupted = False
        self._previous: dict[Signals, Any] = {}
        self._watchers: list[_Watcher] = []

    @property
    def wanted(self) -> bool:
        """Whether this process was asked to stop, by a signal or by the metadata service."""
        return bool(self._notices)

    @property
    def reason(self) -> str:
        """What the first notice was, such as ``SIGTERM`` or ``preempted (metadata)``; empty before it."""
        return self._notices[0].reason if self._notices else ""

    @property
    def signal(self) -> Signals | None:
        """The signal that was the first notice; None before it, and where it was none."""
        return self._notices[0].signal if self._notices else None

    @property
    def deadline(self) -> float | None:
        """When the grace ends, on ``time.monotonic``'s clock.

        None as long as no machine is about to go: before any notice, and after the user's SIGINT alone, who may wait
        for a slow save or send a second one.
        """
        times = [notice.time for notice in self._notices if notice.signal != signal.SIGINT]
        return min(times) + self._grace if times else None

    def remaining(self) -> float | None:
        """Seconds of grace left, never negative; None where there is no deadline."""
        deadline = self.deadline
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    @property
    def told(self) -> Told | None:
        """What this process knows, for :meth:`follow` on the others; None before any notice."""
        return Told(self.reason, self.signal == signal.SIGINT, self.remaining()) if self.wanted else None

    def follow(self, told: Sequence[Told | None]) -> None:
        """Take over what the run's processes were told, once all have agreed to stop.

        A process that was told nothing gets the reason of the first one that was, and ends as it does; the earliest
        deadline is everyone's.

        Args:
            told: each process's :attr:`told`, by process index.
        """
        now = time.monotonic()
        for index, one in enumerate(told):
            if one is not None and one.by_user:
                self._notices.append(_Notice(f"{one.reason} (process {index})", now, signal.SIGINT))
            if one is not None and one.remaining is not None:
                self._notices.append(_Notice(f"{one.reason} (process {index})", now + one.remaining - self._grace))

    def watch_metadata(self, url: str, *, can_migrate: bool) -> None:
        """Listen for preemption and maintenance in the background until the context ends.

        Where no metadata service answers there is nothing to listen to, which is said on the debug level only. This
        returns at once; no name is resolved and nothing is asked in the caller's thread.

        Args:
            url: of the service's ``computeMetadata/v1``.
            can_migrate: whether this machine survives a live migration; one with TPUs does not.
        """
        watcher = _Watcher(Service(url), can_migrate=can_migrate, told=self._tell)
        self._watchers.append(watcher)
        watcher.start()

    def __enter__(self) -> StopNotice:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for watcher in self._watchers:
            watcher.stop()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        received = Signals(number)
        self._notices.append(_Notice(received.name, time.monotonic(), received))

    def _tell(self, reason: str) -> None:
        self._notices.append(_Notice(reason, time.monotonic()))


class _Watcher:
    """The thread that asks, until it is stopped or has something to tell."""

    def __init__(self, service: Service, *, can_migrate: bool, told: Callable[[str], None]) -> None:
        self._service, self._can_migrate, self._told = service, can_migrate, told
        self._stopped = threading.Event()
        self._etag = "0"  # no value's tag: the first question is answered at once, even if nothing changes any more
        self._announced = ""
        # A daemon: an interpreter that exits waits neither for a name server nor for a machine that does not answer.
        self._thread = threading.Thread(target=self._watch, name="metadata-watcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._service.close()

    def _watch(self) -> None:
        if not self._is_there():
            logger.debug("no metadata service answers: preemption is told by SIGTERM only")
            return
        logger.debug("listening to the metadata service")
        delay = BACK_OFF[0]
        while not self._stopped.is_set():
            began = time.monotonic()
            answered, reason = self._preemption()
            reason = reason or self._maintenance()
            if reason and not self._stopped.is_set():
                self._told(reason)
                logger.info("notice to stop: %s", reason)
                return
            # A service that holds its answers needs no pause; one that fails, or does not hold them, gets one.
            delay = BACK_OFF[0] if answered else min(2 * delay, BACK_OFF[1])
            self._stopped.wait(max(0.0, began + delay - time.monotonic()))

    def _is_there(self) -> bool:
        for _ in range(TRIES_AT_START):
            try:
                self._service.get("instance/preempted")
            except Refused:
                return True
            except NoAnswer as error:
                logger.debug("metadata: %s", error)
                if self._stopped.wait(BACK_OFF[0]):
                    return False
            else:
                return True
        return False

    def _preemption(self) -> tuple[bool, str]:
        """Wait for a change, up to the service's time-out; whether it answered, and the reason to stop."""
        value = self._ask(
            "instance/preempted", held=LONG_POLL, wait_for_change="true", timeout_sec=LONG_POLL, last_etag=self._etag
        )
        if value is None:
            return False, ""
        self._etag = value.etag or "0"
        return True, "preempted (metadata)" if value.text.upper() == "TRUE" else ""

    def _maintenance(self) -> str:
        """The reason to stop, if maintenance is one. Not every machine has these values; many have them at times."""
        event = self._ask("instance/maintenance-event")
        action = event.text.upper() if event else ""
        if action.startswith("TERMINATE") or (action.startswith("MIGRATE") and not self._can_migrate):
            return f"maintenance {action} (metadata)"
        announced = self._ask("instance/upcoming-maintenance", alt="json")
        status, start = _upcoming(announced.text) if announced else ("", "")
        if status == "ONGOING":
            return "maintenance ONGOING (metadata)"
        if status == "PENDING" and start != self._announced:
            self._announced = start
            logger.info("maintenance of this machine is announced for %s; training goes on until then", start)
        return ""

    def _ask(self, key: str, *, held: float = 0.0, **query: str | int) -> Value | None:
        try:
            return self._service.get(key, held=held, **query)
        except NoAnswer as error:
            logger.debug("metadata: %s", error)
            return None


def _upcoming(text: str) -> tuple[str, str]:
    """Status (``PENDING``, ``ONGOING``, …) and start of the announced maintenance; empty where there is none.

    Compute Engine writes ``maintenance_status``, the TPU pages ``maintenanceStatus``; both occur inside another object.
    """
    try:
        value = json.loads(text)
    except ValueError:
        return "", ""
    if isinstance(value, dict) and len(value) == 1 and isinstance(inner := next(iter(value.values())), dict):
        value = inner
    if not isinstance(value, dict):
        return "", ""
    fields = {str(name).replace("_", "").lower(): str(entry) for name, entry in value.items()}
    return fields.get("maintenancestatus", "").upper(), fields.get("windowstarttime", "an unknown time")
