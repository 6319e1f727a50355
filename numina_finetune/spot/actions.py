"""The side effects of the table. Each can be repeated, because a supervisor may die in the middle of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from numina_finetune.spot.cloud import (
    AlreadyExists,
    Cloud,
    InvalidRequest,
    Machine,
    NotFound,
    PermissionDenied,
    QueuedState,
    QuotaExceeded,
    StockOut,
)
from numina_finetune.spot.job import SETUP, TRAIN, Job
from numina_finetune.spot.machine import Action, Event
from numina_finetune.spot.observe import look
from numina_finetune.spot.policy import Policy
from numina_finetune.spot.record import Record
from numina_finetune.spot.watch import Finding, refused
from numina_finetune.spot.workers import Workers


class Actions:
    """Args:
    write: stores a changed record.
    """

    def __init__(
        self, cloud: Cloud, workers: Workers, job: Job, policy: Policy, write: Callable[[Record], None]
    ) -> None:
        self._cloud, self._workers, self._job, self._policy, self._write = cloud, workers, job, policy, write
        self._refusal: tuple[str, Finding] | None = None

    def next_machine(self, record: Record) -> Machine:
        """The machine to ask for: its name was never used before, so no late answer can be mistaken for it."""
        target = self._policy.targets[record.target]
        name = f"{self._policy.prefix}-{record.machines + 1}"
        return Machine(name, target.zone, target.accelerator, self._policy.slices)

    def refusal(self, record: Record) -> Finding | None:
        """What the cloud answered to the request for the present machine, if it refused it."""
        if self._refusal is None or record.machine is None or self._refusal[0] != record.machine.name:
            return None
        return self._refusal[1]

    def perform(self, record: Record) -> bool:
        """Carry out ``record.pending``; whether that is done for good.

        Raises:
            CloudError: it is to be tried again.
        """
        if record.pending == Action.SWEEP:
            return self.sweep(keep=None)
        machine = record.machine
        if machine is None:
            return True
        if record.pending == Action.REQUEST:
            return self._request(record, machine)
        if record.pending == Action.DELETE:
            self._delete(machine)
            return True
        view = look(self._cloud, machine)
        if not view.ready:
            return False
        if record.pending == Action.SHIP:
            # A new name each time: what an interrupted attempt started is ended, and must not be taken for this one.
            record = replace(record, set_ups=record.set_ups + 1)
            self._write(record)
            setup, train = setup_name(record), f"{TRAIN}-{record.life + 1}"
            self._workers.ship(machine, view.nodes, self._job, setup=setup, train=train)
        elif record.pending == Action.START:
            self._workers.start(machine, view.nodes, train_name(record))
        elif record.pending == Action.INTERRUPT:
            self._workers.interrupt(machine, view.nodes, train_name(record))
        return True

    def sweep(self, keep: str | None) -> bool:
        """Delete every queued resource of the run but ``keep``; whether there is none other."""
        clear = True
        for machine, state in self.ours():
            if machine.name == keep:
                continue
            clear = False
            if state != QueuedState.DELETING:
                self._delete(machine)
        return clear

    def ours(self) -> list[tuple[Machine, QueuedState]]:
        """The queued resources that carry the run's prefix, in all zones of the run."""
        return [
            (Machine(queued.name, zone, "", 1), queued.state)
            for zone in dict.fromkeys(target.zone for target in self._policy.targets)
            for queued in self._cloud.list(zone)
            if queued.name.startswith(f"{self._policy.prefix}-")
        ]

    def _request(self, record: Record, machine: Machine) -> bool:
        if self.refusal(record) is not None or not self.sweep(keep=machine.name):
            return False
        try:
            self._cloud.create(machine)
        except AlreadyExists:
            return True
        except (StockOut, QuotaExceeded, InvalidRequest) as error:
            self._refusal = (machine.name, refused(error, record, self._policy))
            return False
        except PermissionDenied as error:
            self._refusal = (machine.name, Finding(Event.FORBIDDEN, str(error)))
            return False
        return True

    def _delete(self, machine: Machine) -> None:
        try:
            self._cloud.delete(machine)
        except NotFound:
            return


def setup_name(record: Record) -> str:
    """The job that is the present set-up."""
    return f"{SETUP}-{record.set_ups}"


def train_name(record: Record) -> str:
    """The job that is the present life of the training."""
    return f"{TRAIN}-{record.life}"
