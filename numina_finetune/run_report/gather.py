"""Everything that a run's place says of it, as plain data; what is not there is noted and left out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from numina_finetune.checkpoint.attempts import ATTEMPTS, OUTCOME, STARTED, attempt_numbers
from numina_finetune.storage import NotFound, Store
from numina_finetune.train.metrics import Metrics, kept_seconds, life_of, parse_metrics
from numina_finetune.train.place import DATA_REPORT, METRICS
from numina_finetune.train.record import RECORD

NO_OUTCOME = "no outcome"
"""Of a life that was killed, or is running."""


@dataclass(frozen=True)
class LifeAccount:
    """One life of the run."""

    number: int
    began: float | None
    """Unix time."""
    ended: float | None
    """Unix time: of its outcome, or, where it left none, of the last it is known to have done."""
    kind: str
    """As in ``outcome.json``, or `NO_OUTCOME`."""
    reason: str
    host: str
    first_step: int | None
    """Of its steps that count."""
    last_step: int | None
    saved_step: int | None
    lost_steps: int
    """That it made after its last checkpoint, as far as they were logged, and another life made again."""
    lost_seconds: float
    seconds: Mapping[str, float]
    """That saves and the restore took."""

    @property
    def wall(self) -> float | None:
        if self.began is None or self.ended is None:
            return None
        return max(self.ended - self.began, 0.0)


@dataclass(frozen=True)
class RunAccount:
    """The run."""

    place: str
    record: Mapping[str, Any]
    """``run.yaml``."""
    metrics: Metrics
    data: Mapping[str, Any] | None
    """``data_report.json``."""
    lives: Sequence[LifeAccount]
    missing: Sequence[str]
    """Sentences on what could not be found or read."""

    @property
    def total_steps(self) -> int | None:
        total = self.record.get("total_steps")
        return None if total is None else int(total)

    @property
    def skipped(self) -> list[int]:
        """Steps without an update: their loss or gradient was not finite."""
        return [int(record["step"]) for record in self.metrics.steps if record.get("applied") is False]

    @property
    def goodput(self) -> float | None:
        """Share of all lives' time that made steps that count; None where a life's time is not known."""
        walls = [life.wall for life in self.lives]
        known = [wall for wall in walls if wall is not None]
        if not known or len(known) < len(walls) or not self.metrics.steps:
            return None
        return min(kept_seconds(self.metrics) / max(sum(known), 1e-9), 1.0)


def gather(store: Store) -> RunAccount:
    """Read a run's place; any of it may be absent or cut off."""
    missing: list[str] = []
    record = _yaml(store, missing)
    metrics = _metrics(store, missing)
    data = _json(store, DATA_REPORT)
    if data is None:
        missing.append(f"{DATA_REPORT} is not there or cannot be read: nothing is known of the data")
    lives = [_life(store, number, metrics) for number in attempt_numbers(store)]
    if not lives:
        missing.append(f"{ATTEMPTS}/ is not there: nothing is known of the run's lives")
    missing += [
        f"life {life.number} left no outcome: it was killed, or is running" for life in lives if life.kind == NO_OUTCOME
    ]
    if metrics.steps and not metrics.checkpoints:
        missing.append("no checkpoint is on record yet: a life that ends now begins again")
    return RunAccount(store.url, record, metrics, data, lives, missing)


def _yaml(store: Store, missing: list[str]) -> dict[str, Any]:
    try:
        record = yaml.safe_load(store.read(RECORD))
        if isinstance(record, dict):
            return record
        missing.append(f"{RECORD} is no record of a run")
    except NotFound:
        missing.append(f"{RECORD} is not there: the settings are not known")
    except yaml.YAMLError:
        missing.append(f"{RECORD} is damaged: the settings are not known")
    return {}


def _metrics(store: Store, missing: list[str]) -> Metrics:
    try:
        # As a part, since it may be growing: no checksum would hold.
        metrics = parse_metrics(store.read(METRICS, start=0).decode(errors="replace"))
    except NotFound:
        missing.append(f"{METRICS} is not there: no step is on record")
        return Metrics()
    if metrics.torn:
        missing.append(f"{metrics.torn} line(s) of {METRICS} are incomplete, as a kill leaves them: left out")
    if not metrics.steps:
        missing.append(f"{METRICS} holds no training step yet")
    return metrics


def _json(store: Store, name: str) -> dict[str, Any] | None:
    try:
        value = json.loads(store.read(name))
    except (NotFound, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _life(store: Store, number: int, metrics: Metrics) -> LifeAccount:
    begun = _json(store, f"{ATTEMPTS}/{number}/{STARTED}") or {}
    outcome = _json(store, f"{ATTEMPTS}/{number}/{OUTCOME}")
    steps = [record for record in metrics.steps if life_of(record) == number]
    lost = [record["lost"] for record in metrics.lost if record["lost"]["life"] == number]
    times = [record.get("time") for record in (*steps, *lost)]
    seen = max((float(time) for time in times if time is not None), default=None)
    said = outcome or {}
    return LifeAccount(
        number=number,
        began=begun.get("time"),
        ended=said.get("time", seen),
        kind=said.get("kind", NO_OUTCOME),
        reason=said.get("reason", ""),
        host=said.get("host") or begun.get("host") or "",
        first_step=int(steps[0]["step"]) if steps else None,
        last_step=int(steps[-1]["step"]) if steps else None,
        saved_step=said.get("saved_step"),
        lost_steps=sum(int(each["steps"]) for each in lost),
        lost_seconds=sum(float(each["seconds"]) for each in lost),
        seconds=said.get("seconds", {}),
    )
