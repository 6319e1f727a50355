"""Where the machine time of a run went, and what its tokens cost: from the ledger and the run's own records."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numina_finetune.spot.ledger import read_ledger
from numina_finetune.spot.machine import State
from numina_finetune.storage import Store

CATEGORIES = (
    "provisioning",
    "set-up",
    "start-up and compile",
    "steps",
    "save",
    "restore",
    "lost to preemption",
    "deleting",
    "idle",
)
"""Of the run's whole time. ``idle``: between machines. ``steps``: those that count in the end."""
_STATES = {
    State.REQUESTED: "provisioning",
    State.PROVISIONING: "provisioning",
    State.ACTIVE: "set-up",
    State.SETUP: "set-up",
    State.ABSENT: "idle",
}
_OUTCOME = re.compile(r"attempts/\d+/outcome\.json")


@dataclass
class Account:
    """Sums over the run; seconds.

    Attributes:
        billed: chip-seconds by category, only while a machine was there.
        tokens: trained on, of the steps that count.
        unpriced: chip-seconds whose price is not known.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0.0))
    billed: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0.0))
    dollars: float = 0.0
    unpriced: float = 0.0
    tokens: int = 0
    lives: int = 0
    steps: int = 0

    @property
    def chip_hours(self) -> float:
        return sum(self.billed.values()) / 3600

    @property
    def goodput(self) -> float:
        """Share of the chip time that went into steps that count."""
        whole = sum(self.billed.values())
        return self.billed["steps"] / whole if whole else 0.0

    @property
    def dollars_per_million_tokens(self) -> float | None:
        """None while there are no tokens, or where some of the time has no price."""
        return None if self.unpriced or not self.tokens else self.dollars / self.tokens * 1e6


def account(store: Store) -> Account:
    """Add everything up."""
    result, metrics = Account(), step_records(store)
    result.tokens = sum(int(record.get("tokens", 0)) for record in metrics)
    result.steps = max((int(record["step"]) for record in metrics), default=0)
    own = _seconds_by_category(store)
    lives: list[Mapping[str, Any]] = []
    for line in read_ledger(store):
        state, seconds, chips = line["from"], float(line["seconds"]), float(line["chip_seconds"])
        price = line["dollars_per_chip_hour"]
        result.dollars += chips / 3600 * (price or 0.0)
        result.unpriced += chips if price is None else 0.0
        if state in (State.RUNNING, State.STOPPING):
            lives.append(line)
            continue
        category = _STATES.get(State(state), "deleting")
        result.seconds[category] += seconds
        result.billed[category] += chips
    result.lives = len({line["life"] for line in lives})
    _share_out(result, lives, own, metrics)
    return result


def _share_out(
    result: Account, lives: Sequence[Mapping[str, Any]], own: Mapping[str, float], metrics: Sequence[Mapping[str, Any]]
) -> None:
    """Divide the trainings' time: what the run measured itself first, the rest is start-up and lost steps."""
    whole = sum(float(line["seconds"]) for line in lives)
    chips = sum(float(line["chip_seconds"]) for line in lives)
    if not whole:
        return
    rates = [(int(r["tokens"]), float(r["tokens_per_second"])) for r in metrics if r.get("tokens_per_second")]
    parts = {"steps": sum(tokens / rate for tokens, rate in rates)}
    parts |= {name: own.get(name, 0.0) for name in ("save", "restore")}
    each = parts["steps"] / len(rates) if rates else 0.0
    parts["lost to preemption"] = each * _steps_made_twice(lives)
    used = sum(parts.values())
    if used > whole:  # the clocks of workers and supervisor differ a little
        parts = {name: seconds * whole / used for name, seconds in parts.items()}
    parts["start-up and compile"] = max(whole - sum(parts.values()), 0.0)
    for name, seconds in parts.items():
        result.seconds[name] += seconds
        result.billed[name] += seconds * chips / whole


def _steps_made_twice(lives: Sequence[Mapping[str, Any]]) -> int:
    """Steps beyond the last checkpoint when a life ended, which the next life made again."""
    lost = [int(line["step"] or 0) - int(line["saved_step"]) for line in lives if line["to"] != State.STOPPING]
    return sum(max(steps, 0) for steps in lost)


def step_records(store: Store) -> list[dict[str, Any]]:
    """The records of steps that count; a step that was made again counts once."""
    if store.stat("metrics.jsonl") is None:
        return []
    found: dict[int, dict[str, Any]] = {}
    for line in store.read("metrics.jsonl").decode().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # cut off by a kill
            continue
        if "loss" in record:
            found[int(record["step"])] = record
    return [found[step] for step in sorted(found)]


def _seconds_by_category(store: Store) -> dict[str, float]:
    """What the lives say of themselves: ``seconds`` in ``outcome.json``, by category."""
    total: dict[str, float] = {}
    for entry in store.list("attempts/"):
        if _OUTCOME.fullmatch(entry.name):
            for name, seconds in json.loads(store.read(entry.name)).get("seconds", {}).items():
                total[name] = total.get(name, 0.0) + float(seconds)
    return total


def as_table(result: Account, prices: str) -> str:
    """For a person."""
    whole, chips = sum(result.seconds.values()) or 1.0, sum(result.billed.values()) or 1.0
    lines = [f"{'':24}{'hours':>10}{'share':>9}{'chip-hours':>13}{'share':>9}"]
    for name in CATEGORIES:
        seconds, billed = result.seconds[name], result.billed[name]
        lines.append(
            f"{name:24}{seconds / 3600:>10.2f}{seconds / whole:>9.1%}{billed / 3600:>13.2f}{billed / chips:>9.1%}"
        )
    lines.append(f"{result.lives} lives, {result.steps} steps, {result.tokens} tokens; goodput {result.goodput:.1%}")
    cost = f"${result.dollars:.2f} for {result.chip_hours:.2f} chip-hours"
    if result.unpriced:
        cost += f", and {result.unpriced / 3600:.2f} chip-hours whose price is not known (give --prices)"
    if (per_million := result.dollars_per_million_tokens) is not None:
        cost += f"; ${per_million:.4f} for a million trained tokens"
    return "\n".join([*lines, cost, f"prices: {prices}"])


def draw(result: Account, path: Path) -> None:
    """The chip time by category, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    names = [name for name in CATEGORIES if result.seconds[name] > 0]
    axes.barh(names[::-1], [result.seconds[name] / 3600 for name in names[::-1]], color="#9bb8d3", label="time")
    axes.barh(
        names[::-1],
        [result.billed[name] / 3600 for name in names[::-1]],
        height=0.4,
        color="#1f4e79",
        label="chip time",
    )
    axes.set_xlabel("hours; chip-hours")
    axes.set_title(f"goodput {result.goodput:.1%} of {result.chip_hours:.1f} chip-hours, {result.lives} lives")
    axes.legend()
    figure.savefig(path, dpi=120)
