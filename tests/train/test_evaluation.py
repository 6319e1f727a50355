"""A run that is told to stop while it evaluates has not finished, and one that may finish records what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from numina_finetune.checkpoint.preemption import StopNotice
from numina_finetune.checkpoint.progress import Progress
from numina_finetune.config import RunConfig
from numina_finetune.processes import ProcessGroup
from numina_finetune.train.accuracy import Accuracy
from numina_finetune.train.batch import BatchPlan
from numina_finetune.train.trainer import Plan, Trainer

MEASURED = Accuracy(8, 0.25, 0.07, 0.59)


class Seen:
    """Stands for the report and the checkpoints of a run whose last step is saved already."""

    def __init__(self) -> None:
        self.figures: Mapping[str, float] = {}
        self.noted: tuple[Any, ...] = ()

    committed_step = 4

    def evaluation_at(self, step: int, key: str) -> None:
        return None

    def log_evaluation(self, step: int, figures: Mapping[str, float], line: str, key: str) -> None:
        self.figures, self.line = figures, line

    def note_evaluation(self, *noted: Any) -> None:
        self.noted = noted

    def finish(self) -> bool:
        return True

    def drain(self) -> list[Any]:
        return []

    def pause_clock(self) -> None:
        pass


class Idle:
    """A backend that is asked nothing but who takes part."""

    processes = ProcessGroup()


def last_evaluation(measure: Callable[[Callable[[], bool]], Accuracy | None], notice: StopNotice) -> tuple[bool, Seen]:
    """A life that begins at the last step: whether it finished the run, and what it recorded."""
    seen = Seen()
    trainer = Trainer(
        RunConfig(eval_samples=8),
        Idle(),
        Plan(BatchPlan(1, 1), total_steps=4, total_rows=None),
        None,
        None,
        progress=Progress(step=4),
        checkpoints=seen,
        report=seen,
        notice=notice,
        measure=measure,
    )
    return trainer.run(), seen


@pytest.mark.parametrize("stopping", [False, True])
def test_an_evaluation_that_is_cut_is_left_to_the_next_life(stopping: bool) -> None:
    with StopNotice() as notice:
        finished, seen = last_evaluation(lambda stop: None if stopping else MEASURED, notice)
    assert finished is not stopping
    assert seen.noted == (() if stopping else (4, None, 0.25))
    assert seen.figures == ({} if stopping else MEASURED.figures)


def test_a_line_says_the_accuracy_with_its_interval() -> None:
    assert str(MEASURED) == "accuracy 25.0% of 8 (95% 7.0% to 59.0%)"
