"""From what the cloud, the workers and the run's place show to an event of the table."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numina_finetune.spot.budgets import Ending, Life, Verdict, judge
from numina_finetune.spot.clock import Clock
from numina_finetune.spot.cloud import Cloud, CloudError, InvalidRequest, PermissionDenied
from numina_finetune.spot.gcloud_errors import typed
from numina_finetune.spot.job import SETUP, TRAIN
from numina_finetune.spot.machine import Action, Event, State
from numina_finetune.spot.observe import View, is_gone, look
from numina_finetune.spot.policy import Policy
from numina_finetune.spot.record import Record
from numina_finetune.spot.workers import Place, Status, Workers, log_tail
from numina_finetune.storage import NotFound, Store

_CONFIRM_LOST = 2
"""Looks in a row that must agree that a machine is lost."""
_CONFIRM_SICK = 4
_SETTLE = 120.0
"""Seconds after which what was asked of the cloud shows."""
_OUTCOME = re.compile(r"attempts/(\d+)/outcome(?:\.process-\d+)?\.json")
_STARTED = re.compile(r"attempts/(\d+)/")
_COMMITTED = re.compile(r"checkpoints/step-(\d+)/.*COMMITTED")
_DECISIVE = (Ending.DONE, Ending.CONFIGURATION, Ending.DIVERGED, Ending.PREEMPTED, Ending.STOPPED)
_ENDINGS = {
    Ending.DONE: Event.FINISHED,
    Ending.PREEMPTED: Event.PREEMPTED,
    Ending.CRASHED: Event.CRASHED,
    Ending.CONFIGURATION: Event.HOPELESS,
    Ending.DIVERGED: Event.HOPELESS,
    Ending.STOPPED: Event.SILENT,
    Ending.STALLED: Event.STALLED,
}


@dataclass(frozen=True)
class Finding:
    """An event, and what is known about it.

    Attributes:
        verdict: on a life or set-up that has ended; it is charged to the budgets.
        closed: the present target can never be had.
    """

    event: Event
    reason: str = ""
    step: int | None = None
    verdict: Verdict | None = None
    closed: bool = False


class Watch:
    """Remembers only what a successor can do without: when something was first seen."""

    def __init__(self, cloud: Cloud, workers: Workers, store: Store, policy: Policy, clock: Clock) -> None:
        self._cloud, self._workers, self._store = cloud, workers, store
        self._policy, self._clock = policy, clock
        self.forget()

    def forget(self) -> None:
        """A new state begins."""
        self._lost_looks = 0
        self._sick_looks = 0
        self._ended_since: float | None = None
        self._heard: dict[Place, float] = {}
        self.statuses: Mapping[Place, Status | None] = {}

    def find(self, record: Record) -> Finding | None:
        """The event that the present state waits for, if it has come."""
        if record.machine is None:
            return Finding(Event.GONE) if record.state in (State.DONE, State.FAILED, State.STOPPED) else None
        if record.state in (State.REQUESTED, State.PROVISIONING, State.ACTIVE):
            return self._while_waiting(record)
        if record.state in (State.SETUP, State.RUNNING, State.STOPPING):
            return self._while_used(record)
        settled = not record.unanswered or self._clock.now() - record.since >= _SETTLE
        return Finding(Event.GONE) if settled and is_gone(self._cloud, record.machine) else None

    def newest_attempt(self) -> int:
        """The number of the run's last attempt, 0 where there is none."""
        found = (_STARTED.match(entry.name) for entry in self._store.list("attempts/"))
        return max((int(match[1]) for match in found if match), default=0)

    def saved_step(self) -> int:
        """The step of the newest committed checkpoint, 0 where there is none; of a pipeline, of all its trainings."""
        return sum(self._saved_step(run) for run in ("", *(f"{folder}/" for folder in self._store.folders())))

    def _saved_step(self, run: str) -> int:
        names = (entry.name.removeprefix(run) for entry in self._store.list(f"{run}checkpoints/"))
        return max((int(match[1]) for match in map(_COMMITTED.match, names) if match), default=0)

    # --- waiting for a machine -------------------------------------------------------------------------------------

    def _while_waiting(self, record: Record) -> Finding | None:
        assert record.machine is not None
        waited = self._clock.now() - record.since
        if record.pending == Action.REQUEST:
            over = waited >= self._policy.queue_seconds
            return Finding(Event.REFUSED, f"no answer for {waited / 60:.0f} minutes") if over else None
        view = look(self._cloud, record.machine)
        if view.stage == "failed":
            return refused(typed(view.error), record, self._policy)
        if view.stage == "leaving" or (view.stage == "absent" and waited >= _SETTLE):
            return Finding(Event.LOST, view.what)
        if record.state == State.ACTIVE:
            if view.ready and not view.sick:
                return Finding(Event.READY)
            over = waited >= self._policy.ready_seconds
            return Finding(Event.LOST, f"not ready after {waited / 60:.0f} minutes: {view.what}") if over else None
        if view.stage == "active":
            return Finding(Event.ACTIVE)
        if view.stage == "provisioning" and record.state == State.REQUESTED:
            return Finding(Event.PROVISIONING)
        if waited >= self._policy.queue_seconds and len(self._policy.targets) - len(record.closed) > 1:
            return Finding(Event.REFUSED, f"{waited / 60:.0f} minutes in the queue")
        return None

    # --- set-up and training ---------------------------------------------------------------------------------------

    def _while_used(self, record: Record) -> Finding | None:
        machine = record.machine
        assert machine is not None
        view = look(self._cloud, machine)
        self._lost_looks = self._lost_looks + 1 if view.lost else 0
        self._sick_looks = self._sick_looks + 1 if view.sick else 0
        gone = self._lost_looks >= _CONFIRM_LOST or self._sick_looks >= _CONFIRM_SICK
        waited = self._clock.now() - record.since
        if record.pending in (Action.SHIP, Action.START) and not gone:
            return self._overdue_start(record, waited)
        name = f"{SETUP}-{record.set_ups}" if record.state == State.SETUP else f"{TRAIN}-{record.life}"
        if view.nodes:
            self.statuses = self._workers.statuses(machine, view.nodes, name)
        if record.state == State.SETUP:
            return self._lost(view, record) if gone else self._set_up(record, name, waited)
        return self._trained(record, name, view, gone=gone, waited=waited)

    def _overdue_start(self, record: Record, waited: float) -> Finding | None:
        limit = self._policy.setup_seconds if record.state == State.SETUP else self._policy.stall_seconds
        if waited < limit:
            return None
        reason = f"the workers could not be made to start within {waited / 60:.0f} minutes"
        return _charged(Verdict(Ending.STALLED if record.state == State.RUNNING else Ending.CRASHED, None, reason))

    def _set_up(self, record: Record, name: str, waited: float) -> Finding | None:
        heard = [status for status in self.statuses.values() if status is not None]
        everyone = bool(self.statuses) and len(heard) == len(self.statuses)
        if everyone and all(status.exit_code == 0 for status in heard):
            return Finding(Event.SET_UP)
        if waited >= self._policy.setup_seconds:
            return _charged(Verdict(Ending.CRASHED, None, f"the set-up took more than {waited / 60:.0f} minutes"))
        failed = [status for status in heard if status.ended and status.exit_code != 0]
        # A preemption ends the set-up too: the machine's state gets the time to show it.
        if not failed or not self._grace_is_over():
            return None
        reason = f"the set-up failed: {log_tail(self._store, name)}"
        return _charged(Verdict(Ending.CRASHED, None, reason))

    def _trained(self, record: Record, name: str, view: View, *, gone: bool, waited: float) -> Finding | None:
        now = self._clock.now()
        heard = {place: status for place, status in self.statuses.items() if status is not None}
        self._heard |= dict.fromkeys(heard, now)
        outcomes = self._outcomes(record.attempts_before)
        kinds = {str(outcome.get("kind")) for outcome in outcomes}
        if any(status.more_log for status in heard.values()) and not gone:
            self._ended_since = self._ended_since or (now if self._ended(heard) else None)
            if self._ended(heard):
                return None  # the rest of the log first
        step = max((status.step for status in heard.values() if status.step is not None), default=None)
        done = len(heard) == len(self.statuses) and bool(heard) and all(status.ended for status in heard.values())
        decided = done and bool(kinds.intersection(_DECISIVE))
        if decided or gone or (self._ended(heard) and self._grace_is_over()):
            codes = [status.exit_code for status in heard.values()]
            verdict = judge(Life(outcomes, codes, machine_sound=not gone, steps=step))
            if verdict.ending in (Ending.CRASHED, Ending.CONFIGURATION, Ending.DIVERGED):
                verdict = Verdict(verdict.ending, verdict.step, f"{verdict.reason}\n{log_tail(self._store, name)}")
            if record.state == State.STOPPING and verdict.ending != Ending.DONE:
                return Finding(Event.SILENT, record.reason, verdict.step)
            if gone and verdict.ending == Ending.PREEMPTED:
                verdict = Verdict(verdict.ending, verdict.step, f"{view.what}; {verdict.reason}")
            return _charged(verdict)
        if record.state == State.STOPPING:
            over = waited >= self._policy.stop_seconds
            return Finding(Event.SILENT, f"{record.reason}; it did not end in time", step) if over else None
        return self._stalled(heard, record, step)

    def _stalled(self, heard: Mapping[Place, Status], record: Record, step: int | None) -> Finding | None:
        limit, now = self._policy.stall_seconds, self._clock.now()
        mute = [place for place in self.statuses if now - self._heard.get(place, record.since) > limit]
        dumb = [place for place, status in heard.items() if status.beat_age > limit]
        still = bool(heard) and min(status.step_age for status in heard.values()) > limit
        nobody = not self.statuses and now - record.since > limit
        if not (mute or dumb or still or nobody):
            return None
        if mute or nobody:
            reason = f"worker {_named(mute)} could not be reached for {limit / 60:.0f} minutes"
        elif dumb:
            reason = f"worker {_named(dumb)} gave no heartbeat for {limit / 60:.0f} minutes"
        else:
            reason = f"no step after {step} for {limit / 60:.0f} minutes"
        return _charged(Verdict(Ending.STALLED, step, reason))

    def _lost(self, view: View, record: Record) -> Finding:
        return Finding(Event.LOST, view.what, record.step)

    def _ended(self, heard: Mapping[Place, Status]) -> bool:
        """Some worker has ended: without it, the others only wait."""
        return any(status.ended for status in heard.values())

    def _grace_is_over(self) -> bool:
        now = self._clock.now()
        self._ended_since = self._ended_since or now
        # A worker that has ended on a machine that is being lost is not a crash.
        return now - self._ended_since >= self._policy.grace_seconds and self._lost_looks == 0

    def _outcomes(self, before: int) -> list[dict[str, Any]]:
        """Of all processes of the newest attempt after number ``before``."""
        found: dict[int, list[str]] = {}
        for entry in self._store.list("attempts/"):
            match = _OUTCOME.fullmatch(entry.name)
            if match and int(match[1]) > before:
                found.setdefault(int(match[1]), []).append(entry.name)
        outcomes = []
        for name in found[max(found)] if found else []:
            try:
                outcomes.append(json.loads(self._store.read(name)))
            except (NotFound, ValueError):  # being replaced
                continue
        return outcomes


def refused(error: CloudError, record: Record, policy: Policy) -> Finding:
    """What a refusal means: another place or time, or nothing that can help."""
    closed = isinstance(error, InvalidRequest)
    open_targets = len(policy.targets) - len({*record.closed, *([record.target] if closed else [])})
    if isinstance(error, PermissionDenied) or open_targets == 0:
        return Finding(Event.FORBIDDEN, str(error))
    return Finding(Event.REFUSED, str(error), closed=closed)


def _charged(verdict: Verdict) -> Finding:
    return Finding(_ENDINGS[verdict.ending], verdict.reason, verdict.step, verdict)


def _named(places: list[Place]) -> str:
    return ", ".join(f"{node}-{worker}" for node, worker in places) or "(none seen)"
