"""The run's account: one JSON line a state change, with what the machine cost in the state that ended."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from numina_finetune.spot.prices import Prices
from numina_finetune.spot.record import Bill, Record
from numina_finetune.spot.shapes import shape_of
from numina_finetune.storage import Store

LEDGER = "spot/ledger.jsonl"


class Ledger:
    """The lines in their place; each is written once, whoever writes it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lines: list[str] = []
        self._generation = 0

    def load(self) -> None:
        """Read what earlier supervisors wrote."""
        entry = self._store.stat(LEDGER)
        self._generation = entry.generation if entry else 0
        data = self._store.read(LEDGER, generation=entry.generation) if entry else b""
        self._lines = data.decode().splitlines()

    def append(self, line: dict[str, Any]) -> None:
        """Add a line, unless one of its number is there.

        Raises:
            PreconditionFailed: another supervisor has written.
        """
        if self._lines and int(json.loads(self._lines[-1])["number"]) >= int(line["number"]):
            return
        self._lines.append(json.dumps(line))
        data = ("\n".join(self._lines) + "\n").encode()
        self._generation = self._store.write(LEDGER, data, if_generation=self._generation).generation


def read_ledger(store: Store) -> Sequence[dict[str, Any]]:
    """All lines, oldest first."""
    if store.stat(LEDGER) is None:
        return []
    return [json.loads(line) for line in store.read(LEDGER).decode().splitlines()]


def ledger_line(before: Record, after: Record, prices: Prices) -> dict[str, Any]:
    """The line of the change from one record to the next."""
    machine = before.machine or after.machine
    seconds = after.since - before.since
    billed = before.bill.since is not None
    chips = machine_chips(before) if billed else 0
    price = prices.of(machine.accelerator, machine.zone) if machine else None
    return {
        "number": after.number,
        "time": round(after.since, 3),
        "from": before.state,
        "to": after.state,
        "event": after.event,
        "seconds": round(seconds, 3),
        "machine": machine.name if machine else None,
        "zone": machine.zone if machine else None,
        "accelerator": machine.accelerator if machine else None,
        "slices": machine.slices if machine else None,
        "chip_seconds": round(seconds * chips, 3),
        "dollars_per_chip_hour": price,
        "life": after.life,
        "step": after.step,
        "saved_step": after.spent.saved_step,
        "reason": after.reason,
    }


def machine_chips(record: Record) -> int:
    """Chips of the present machine, all slices together."""
    machine = record.machine
    return shape_of(machine.accelerator).chips * machine.slices if machine else 0


def closed_bill(record: Record, now: float, prices: Prices) -> Bill:
    """The bill with the present machine's time up to ``now``, and that machine costing no more."""
    bill, machine = record.bill, record.machine
    if bill.since is None or machine is None:
        return bill
    seconds = max(now - bill.since, 0.0)
    chip_seconds = seconds * machine_chips(record)
    price = prices.of(machine.accelerator, machine.zone)
    return Bill(
        since=None,
        seconds=bill.seconds + seconds,
        chip_seconds=bill.chip_seconds + chip_seconds,
        cost=bill.cost + chip_seconds / 3600 * (price or 0.0),
        unpriced=bill.unpriced + (chip_seconds if price is None else 0.0),
    )
