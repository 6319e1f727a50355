"""The loop: look, decide by the table, write it down, act; again until nothing is left to do."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from numina_finetune.errors import ExitCode
from numina_finetune.spot import ledger as accounts
from numina_finetune.spot.actions import Actions
from numina_finetune.spot.budgets import Ending, Spent, Verdict, charge
from numina_finetune.spot.clock import Clock
from numina_finetune.spot.cloud import Cloud, CloudError
from numina_finetune.spot.job import Job
from numina_finetune.spot.lease import Lease
from numina_finetune.spot.machine import TABLE, Action, Event, State
from numina_finetune.spot.policy import Policy
from numina_finetune.spot.prices import Prices
from numina_finetune.spot.record import STOP, Record, Records
from numina_finetune.spot.watch import Finding, Watch
from numina_finetune.spot.workers import Workers
from numina_finetune.storage import PreconditionFailed, StorageUnavailable, Store

logger = logging.getLogger(__name__)

_DELETING = (State.REFUSED, State.PREEMPTED, State.CRASHED, State.STALLED, State.DONE, State.FAILED, State.STOPPED)
_STORAGE_PATIENCE = 600.0
"""Seconds without the run's place after which a supervisor ends; the machine stays, and the next one goes on."""
_EXIT_CODES = {
    "done": ExitCode.DONE,
    "stopped": ExitCode.STOPPED,
    "configuration": ExitCode.CONFIGURATION,
    "diverged": ExitCode.DIVERGED,
}


class Supervisor:
    """Supervises one run; whatever kills it, another one goes on from the record."""

    def __init__(
        self,
        cloud: Cloud,
        store: Store,
        job: Job,
        policy: Policy,
        prices: Prices,
        clock: Clock,
        *,
        home: str,
        rng: random.Random | None = None,
        lease: Lease | None = None,
        tell: Callable[[str], None] = logger.info,
    ) -> None:
        self._store, self._policy, self._prices, self._clock = store, policy, prices, clock
        self._rng, self._tell = rng or random.Random(), tell
        self._lease = lease or Lease(store, clock)
        self._records, self._ledger = Records(store), accounts.Ledger(store)
        workers = Workers(cloud, home, store, self._lease.keep)
        self._watch = Watch(cloud, workers, store, policy, clock)
        self._actions = Actions(cloud, workers, job, policy, self._write)
        self._record = Record()
        self._stop_asked = False
        self._unseen_since: float | None = None

    @property
    def record(self) -> Record:
        return self._record

    def ask_to_stop(self) -> None:
        """Have the training save, and delete the machine; may be called from a signal handler."""
        self._stop_asked = True

    def run(self) -> ExitCode:
        """Supervise until the run has ended.

        Raises:
            LeaseHeld, LeaseLost: another supervisor works on it.
            StorageUnavailable: the run's place could not be reached for minutes.
        """
        self._lease.take()
        try:
            self._begin()
            while self._record.state != State.ENDED or self._record.pending != Action.NONE:
                if not self._tick_safely():
                    self._clock.sleep(self._policy.poll_seconds)
            return _EXIT_CODES.get(self._record.verdict, ExitCode.CRASHED)
        finally:
            self._lease.give_back()

    def _begin(self) -> None:
        """Take up the record; a run that had ended otherwise than done begins again."""
        now = self._clock.now()
        stored = self._records.load()
        self._ledger.load()
        if stored is None:
            self._store.delete(STOP)
            self._record = Record(since=now, began=now)
            self._records.save(self._record)
            return
        self._record = stored
        if stored.line:
            self._ledger.append(stored.line)
        if stored.state == State.ENDED and stored.pending == Action.NONE and stored.verdict != "done":
            self._store.delete(STOP)
            # What was charged to the run counts on in the ledger only: who starts it again has looked at it.
            fresh = Spent(saved_step=stored.spent.saved_step, preemptions=stored.spent.preemptions)
            self._write(
                replace(
                    stored, state=State.ABSENT, since=now, verdict="", reason="", spent=fresh, closed=(), not_before=0
                )
            )
            return
        if stored.number:
            self._tell(f"going on with {stored.state}, {stored.machine.name if stored.machine else 'no machine'}")

    def _tick_safely(self) -> bool:
        """One turn; whether the state changed. Storage faults are waited out, not forever."""
        try:
            self._lease.keep()
            changed = self._tick()
        except StorageUnavailable as error:
            now = self._clock.now()
            self._unseen_since = self._unseen_since or now
            if now - self._unseen_since > _STORAGE_PATIENCE:
                raise
            self._tell(f"the run's place cannot be reached: {error}")
            return False
        self._unseen_since = None
        return changed

    def _tick(self) -> bool:
        before = self._record.number
        self._perform()
        finding = self._find()
        if finding is not None:
            self._apply(finding)
        return self._record.number != before

    # --- deciding --------------------------------------------------------------------------------------------------

    def _find(self) -> Finding | None:
        """What has happened, if anything that the table answers."""
        for finding in (self._wish(), self._actions.refusal(self._record), self._watch.find(self._record)):
            if finding is not None and (self._record.state, finding.event) in TABLE:
                return finding
        return None

    def _wish(self) -> Finding | None:
        record = self._record
        if record.state in (State.DONE, State.FAILED, State.STOPPED, State.STOPPING, State.ENDED):
            return None
        if self._stop_asked or self._store.stat(STOP) is not None:
            return Finding(Event.STOP, "the user asked for it")
        bill = accounts.closed_bill(record, self._clock.now(), self._prices)
        if self._policy.max_hours is not None and bill.seconds >= self._policy.max_hours * 3600:
            return Finding(Event.LIMIT, f"--max-hours {self._policy.max_hours:g} are used up")
        if self._policy.max_cost is not None and bill.cost >= self._policy.max_cost:
            return Finding(Event.LIMIT, f"--max-cost {self._policy.max_cost:g} is used up")
        if record.state == State.ABSENT and self._clock.now() >= record.not_before:
            return Finding(Event.DUE)
        return None

    def _apply(self, finding: Finding) -> None:
        """Go to the next state: written down first, then done."""
        now, before = self._clock.now(), self._record
        event, changes = self._consequences(finding)
        action, following = TABLE[before.state, event]
        after = replace(
            before,
            state=following,
            since=now,
            previous=before.state,
            event=event,
            number=before.number + 1,
            pending=action,
            unanswered=before.pending == Action.REQUEST and self._actions.refusal(before) is None,
            reason=finding.reason,
            step=finding.step if finding.step is not None else before.step,
        )
        self._watch.forget()
        self._change(before, replace(after, **changes))
        self._perform()

    def _consequences(self, finding: Finding) -> tuple[Event, dict[str, Any]]:
        """The event as the budgets see it, and what else of the record changes with it."""
        event, record, now = finding.event, self._record, self._clock.now()
        changes: dict[str, Any] = {}
        if finding.verdict is not None or event == Event.LOST:
            verdict = finding.verdict or Verdict(Ending.PREEMPTED, record.step, finding.reason)
            spent, over = charge(record.spent, verdict, self._watch.saved_step(), self._policy.budgets)
            changes["spent"] = spent
            if over:
                event = Event.HOPELESS
                final = verdict.ending in (Ending.CONFIGURATION, Ending.DIVERGED)
                kind = str(verdict.ending) if final else "failed"
                changes |= {"verdict": kind, "reason": over}
            elif event == Event.CRASHED:
                event = Event.CRASHED_AGAIN if record.crashes_here else event
                changes["crashes_here"] = record.crashes_here + 1
            if event in (Event.LOST, Event.PREEMPTED, Event.CRASHED_AGAIN, Event.STALLED):
                changes |= self._after_a_life(spent)
        if event == Event.DUE:
            changes |= {
                "machine": self._actions.next_machine(record),
                "machines": record.machines + 1,
                "crashes_here": 0,
            }
        elif event == Event.ACTIVE:
            changes["bill"] = replace(record.bill, since=now)
        elif event == Event.SET_UP:
            changes |= {"life": record.life + 1, "attempts_before": self._watch.newest_attempt()}
        elif event == Event.REFUSED:
            changes |= self._after_a_refusal(finding)
        elif event == Event.FORBIDDEN:
            changes["verdict"] = "configuration"
        elif event in (Event.STOP, Event.LIMIT):
            changes["verdict"] = "stopped" if event == Event.STOP else "limit"
        elif event == Event.FINISHED:
            changes["verdict"] = "done"
        elif event == Event.SILENT and not record.verdict:
            changes["verdict"] = "stopped"
        if event == Event.GONE:
            changes |= {"machine": None, "reason": record.reason}
        if event in (Event.LOST, Event.GONE):
            changes["bill"] = accounts.closed_bill(record, now, self._prices)
        return event, changes

    def _after_a_life(self, spent: Spent) -> dict[str, Any]:
        """When and where to try again: at once after progress, later and elsewhere after lives that saved nothing."""
        wait = self._backoff(spent.fruitless - 1) if spent.fruitless > 1 else 0.0
        target = self._next_target() if spent.fruitless > 1 else self._record.target
        return {"not_before": self._clock.now() + wait, "target": target}

    def _after_a_refusal(self, finding: Finding) -> dict[str, Any]:
        record = self._record
        closed = (*record.closed, record.target) if finding.closed else record.closed
        spent = replace(record.spent, refusals=record.spent.refusals + 1)
        rounds, place = divmod(spent.refusals, max(len(self._policy.targets) - len(closed), 1))
        # Within a round the next place is tried at once; after a round, all of them have said no.
        wait = self._backoff(rounds) if place == 0 and rounds else 0.0
        return {
            "spent": spent,
            "closed": closed,
            "target": self._next_target(closed),
            "not_before": self._clock.now() + wait,
        }

    def _backoff(self, times: int) -> float:
        longest = self._policy.max_backoff_seconds
        return min(self._policy.backoff_seconds * 2.0 ** min(times - 1, 16), longest) * self._rng.uniform(0.5, 1.5)

    def _next_target(self, closed: tuple[int, ...] | None = None) -> int:
        closed, count = self._record.closed if closed is None else closed, len(self._policy.targets)
        order = [(self._record.target + step) % count for step in range(1, count + 1)]
        return next((target for target in order if target not in closed), self._record.target)

    # --- writing and acting ----------------------------------------------------------------------------------------

    def _change(self, before: Record, after: Record) -> None:
        after = replace(after, line=accounts.ledger_line(before, after, self._prices))
        self._write(after)
        self._ledger.append(after.line)
        where = f"{after.machine.name} in {after.machine.zone}" if after.machine else ""
        self._tell(f"{before.state} -> {after.state} ({after.event}) {where} {after.reason}".rstrip())

    def _write(self, record: Record) -> None:
        """Store the record; only then is it what this supervisor goes by."""
        try:
            self._records.save(record)
        except PreconditionFailed:
            self._lease.lost()
        self._record = record

    def _perform(self) -> None:
        """Carry out what the record says is to be done; what fails is tried again at the next turn."""
        if self._record.pending == Action.NONE:
            return
        self._lease.keep()
        try:
            done = self._actions.perform(self._record)
        except CloudError as error:
            self._tell(f"{self._record.pending} of {self._record.state}: {error}")
            return
        if done:
            self._write(replace(self._record, pending=Action.NONE))
