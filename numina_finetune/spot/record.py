"""What the supervisor knows, kept in the run's own place so that another supervisor can go on from it.

``{run}/spot/record.json`` is written before each side effect, bound to the generation that this supervisor wrote
last: one that has lost its lease cannot write, and so does nothing.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from numina_finetune.errors import CheckpointError
from numina_finetune.spot.budgets import Spent
from numina_finetune.spot.cloud import Machine
from numina_finetune.spot.machine import Action, State
from numina_finetune.storage import NotFound, Store

RECORD = "spot/record.json"
STOP = "spot/stop.json"
"""Present while the user wants the run to stop."""


@dataclass(frozen=True)
class Bill:
    """What the machines have used so far.

    Attributes:
        since: when the present machine began to cost; None while none does.
        seconds: that machines have cost, the present one left out.
        chip_seconds: the same times the chips.
        cost: of those whose price is known, in dollars.
        unpriced: chip-seconds without a known price.
    """

    since: float | None = None
    seconds: float = 0.0
    chip_seconds: float = 0.0
    cost: float = 0.0
    unpriced: float = 0.0


@dataclass(frozen=True)
class Record:
    """Everything that decides what the supervisor does next."""

    state: State = State.ABSENT
    since: float = 0.0
    """When the state was entered; all times are seconds since 1970."""
    began: float = 0.0
    """When the run was first supervised."""
    number: int = 0
    """State changes so far; the ledger's lines carry it."""
    event: str = ""
    """What led to the state."""
    previous: State = State.ABSENT
    pending: Action = Action.NONE
    """Not known to be carried out."""
    unanswered: bool = False
    """The request for the machine was given up before it was answered: the machine may still appear."""
    machine: Machine | None = None
    machines: int = 0
    """Asked for so far; the names carry it."""
    target: int = 0
    """Position in the rotation over accelerators and zones."""
    closed: tuple[int, ...] = ()
    """Targets that can never be had, by position."""
    not_before: float = 0.0
    """When the next machine may be asked for."""
    crashes_here: int = 0
    """On the present machine."""
    life: int = 0
    """Trainings started, or about to be."""
    set_ups: int = 0
    """The same of set-ups."""
    attempts_before: int = 0
    """The run's greatest attempt number before the present life."""
    step: int | None = None
    """Last one seen."""
    verdict: str = ""
    """At the end: done, failed, stopped or limit."""
    reason: str = ""
    line: dict[str, Any] = field(default_factory=dict)
    """The ledger's line of the change to this state, in case it was not written."""
    spent: Spent = field(default_factory=Spent)
    bill: Bill = field(default_factory=Bill)

    def to_json(self) -> bytes:
        return (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode()

    @staticmethod
    def from_json(data: bytes, where: str) -> Record:
        """Raises: CheckpointError: no record of this version."""
        try:
            values: dict[str, Any] = json.loads(data)
            machine = values.pop("machine")
            return Record(
                **{
                    **values,
                    "state": State(values["state"]),
                    "previous": State(values["previous"]),
                    "pending": Action(values["pending"]),
                    "closed": tuple(values["closed"]),
                    "machine": Machine(**machine) if machine else None,
                    "spent": Spent(**values["spent"]),
                    "bill": Bill(**values["bill"]),
                }
            )
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{where} is damaged, or of another version ({error!r}): move it away") from error


class Records:
    """The record in its place."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._generation = 0

    def load(self) -> Record | None:
        """The stored record; later writes replace just this one."""
        entry = self._store.stat(RECORD)
        if entry is None:
            self._generation = 0
            return None
        self._generation = entry.generation
        try:
            data = self._store.read(RECORD, generation=entry.generation)
        except NotFound:  # replaced meanwhile
            return self.load()
        return Record.from_json(data, self._store.address(RECORD))

    def save(self, record: Record) -> None:
        """Raises: PreconditionFailed: someone else has written since."""
        self._generation = self._store.write(RECORD, record.to_json(), if_generation=self._generation).generation
