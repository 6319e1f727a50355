"""What a step leaves about itself: ``step.json`` in its folder, rewritten at each beginning and end of a life."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from numina_finetune.errors import CheckpointError, ExitCode
from numina_finetune.pipeline.plan import Step
from numina_finetune.storage import Damaged, NotFound, open_store

RECORD = "step.json"
FORMAT = 1
"""Raised where an older reader could not read what is written."""
NOT_RUN, BEGUN, DONE = "not run", "begun", "done"


@dataclass(frozen=True)
class Life:
    """One time that the step was worked at; without an end, it was killed or is under way."""

    began: float
    """Unix time."""
    host: str
    ended: float | None = None
    code: int | None = None


@dataclass(frozen=True)
class StepRecord:
    """How a step stands."""

    state: str = NOT_RUN
    lives: tuple[Life, ...] = ()
    outputs: Mapping[str, str] = field(default_factory=dict)
    """Addresses by name, of a step that is done."""
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Of the lives whose end is known."""
        return sum(life.ended - life.began for life in self.lives if life.ended is not None)

    def begun(self) -> StepRecord:
        """With a new life."""
        life = Life(time.time(), socket.gethostname())
        return replace(self, state=BEGUN, lives=(*self.lives, life))

    def ended(self, code: ExitCode) -> StepRecord:
        """With the end of the last life."""
        life = replace(self.lives[-1], ended=time.time(), code=int(code))
        return replace(self, lives=(*self.lives[:-1], life))

    def done(self, outputs: Mapping[str, str], figures: Mapping[str, float]) -> StepRecord:
        """Of a step that has left all its outputs."""
        return replace(self, state=DONE, outputs=dict(outputs), figures=dict(figures))

    def is_done(self, step: Step) -> bool:
        """Whether nothing that the step is to leave is missing; a training may be asked for more than it was."""
        return self.state == DONE and set(step.outputs) <= set(self.outputs)


def read_step(step: Step) -> StepRecord:
    """How the step stands.

    Raises:
        CheckpointError: its record cannot be read.
    """
    store = open_store(step.location.url)
    try:
        found: dict[str, Any] = json.loads(store.read(RECORD))
        lives = tuple(Life(**life) for life in found["lives"])
        return StepRecord(found["state"], lives, found["outputs"], found["figures"])
    except NotFound:
        return StepRecord()
    except (Damaged, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{store.address(RECORD)} is damaged or no record of a step ({error!r}): move its folder away"
        ) from error


def write_step(step: Step, record: StepRecord) -> None:
    """Replace the step's record."""
    about = {"format": FORMAT, "step": step.name, "kind": step.kind, "key": step.key, "options": dict(step.options)}
    open_store(step.location.url).write_json(RECORD, {**about, "needs": list(step.needs), **asdict(record)})
