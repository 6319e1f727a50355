"""A notice in the middle of an evaluation loses no step, and what was evaluated once is not evaluated again."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from numina_finetune.cli.entry import run_command
from numina_finetune.config import RunConfig
from numina_finetune.errors import ExitCode
from numina_finetune.train.trainer import evaluation_key
from tests.conftest import Run, options_of

pytestmark = pytest.mark.usefixtures("native_here")


def train(folder: Path, *options: str) -> Run:
    """The default settings, in this process."""
    written = io.StringIO()
    with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
        code = run_command(options_of(folder, *options))
    return Run(code, written.getvalue(), folder)


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[int]]:
    """Counts the batches of each evaluation loss, and sends SIGTERM with one of them, the first being 1."""
    from numina_finetune.torch_native.backend import NativeBackend

    sound = NativeBackend.evaluate

    def counted(stop_at: int | None) -> list[int]:
        counts: list[int] = []

        def evaluate(self: Any, batches: Iterable[Any]) -> tuple[float, int]:
            counts.append(0)

            def watched() -> Iterator[Any]:
                for batch in batches:
                    counts[-1] += 1
                    if counts[-1] == stop_at:
                        os.kill(os.getpid(), signal.SIGTERM)
                    yield batch

            return sound(self, watched())

        monkeypatch.setattr(NativeBackend, "evaluate", evaluate)
        return counts

    return counted


EVALUATING = ("--validation-size", "24", "--eval-steps", "4", "--max-steps", "6", "--logging-steps", "2")


def test_a_notice_during_the_evaluation_loss_is_heard_at_its_next_batch_and_loses_no_step(
    tmp_path: Path, evaluated: Callable[[int | None], list[int]]
) -> None:
    counts = evaluated(2)
    run = train(tmp_path / "out", *EVALUATING)
    assert run.code == ExitCode.PREEMPTED, run.output
    assert counts == [2] and run.outcome()["saved_step"] == 4, "far from --save-steps"
    assert [path.parent.name for path in run.checkpoints] == ["step-00000004"]

    again = evaluated(None)
    run = train(tmp_path / "out", *EVALUATING)
    assert run.code == ExitCode.DONE, run.output
    assert len(again) == 2, "the one that was cut, and the last step's"
    assert [record["step"] for record in run.metrics if "eval_loss" in record] == [4, 6]


def test_an_evaluation_that_was_finished_is_not_made_again(
    tmp_path: Path, evaluated: Callable[[int | None], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from numina_finetune.train.report import Report

    sound = Report.log_evaluation

    def stop_behind(self: Any, *arguments: Any) -> None:
        sound(self, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Report, "log_evaluation", stop_behind)
    run = train(tmp_path / "out", *EVALUATING)
    assert run.code == ExitCode.PREEMPTED and run.outcome()["saved_step"] == 4, run.output
    (first,) = [record["eval_loss"] for record in run.metrics if "eval_loss" in record]

    monkeypatch.setattr(Report, "log_evaluation", sound)
    counts = evaluated(None)
    run = train(tmp_path / "out", *EVALUATING)
    assert run.code == ExitCode.DONE and len(counts) == 1, run.output
    found = {record["step"]: record["eval_loss"] for record in run.metrics if "eval_loss" in record}
    assert found[4] == first and list(found) == [4, 6]
    code, said = 0, io.StringIO()
    with contextlib.redirect_stdout(said):
        code = run_command(["checkpoints", "list", str(run.run)])
    assert code == 0 and f"{first:.4f}" in said.getvalue(), "the checkpoint is known by it"


def test_an_evaluation_of_something_else_is_made_anew() -> None:
    asked = RunConfig(eval_dataset_name="data.jsonl", eval_samples=8)
    others = [replace(asked, eval_split="train"), replace(asked, eval_samples=9), replace(asked, validation_size=0.1)]
    assert evaluation_key(asked) == evaluation_key(replace(asked, logging_steps=7, per_device_eval_batch_size=2))
    assert evaluation_key(asked) not in map(evaluation_key, others)
