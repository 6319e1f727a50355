"""What a user may ask for when saving and resuming, and what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from numina_finetune.checkpoint.reading import committed
from numina_finetune.cli import run_command
from numina_finetune.storage import open_store
from tests.conftest import TINY, Run, state_of

pytestmark = pytest.mark.usefixtures("native_here")
Train = Callable[..., Run]
EIGHT = ("--max-steps", "8", "--save-steps", "4", "--logging-steps", "1")


@pytest.fixture
def train(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Train:
    """The training command, run in this process, into one output folder."""
    (tmp_path / "out").mkdir()

    def run(*arguments: str) -> Run:
        options = [*TINY, "--output-dir", str(tmp_path / "out"), "--cache-dir", str(tmp_path / "cache"), *arguments]
        code = run_command([*options, "--backend", "native"])
        output, errors = capfd.readouterr()
        return Run(code, output + errors, tmp_path / "out")

    return run


def go_back(run: Path, step: int) -> None:
    """As if the run had been killed after this step's checkpoint."""
    store = open_store(run)
    for checkpoint in committed(store):
        if checkpoint.step > step:
            store.delete(f"{checkpoint.prefix}COMMITTED")


def data(path: Path, count: int, first: int = 0) -> Path:
    rows = ({"question": f"What is {n} + {n}?", "answer": f"It is {2 * n}."} for n in range(first, first + count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_other_data_is_refused_with_both_keys_unless_it_is_allowed(train: Train, tmp_path: Path) -> None:
    rows = data(tmp_path / "rows.jsonl", 300)
    options = (*EIGHT, "--run-id", "mine", "--dataset-name", str(rows), "--format", "qa")
    first = train(*options)
    assert first.code == 0, first.output
    before = committed(open_store(first.run))[0].open().manifest
    go_back(first.run, 4)
    data(rows, 300, first=1000)
    refused = train(*options)
    assert refused.code == 2
    assert f"data_key was {before['data_key']}, is " in refused.output
    assert "--allow-data-change" in refused.output
    allowed = train(*options, "--allow-data-change")
    assert allowed.code == 0, allowed.output
    assert f"the training data changed (data_key was {before['data_key']}, is " in allowed.output
    assert "resumed from the checkpoint of step 4/8" in allowed.output
    assert [record["step"] for record in allowed.metrics if "loss" in record] == list(range(1, 9))


def test_a_run_may_begin_from_another_runs_checkpoint_and_then_resumes_from_its_own(train: Train) -> None:
    first = train(*EIGHT, "--run-id", "first")
    assert first.code == 0, first.output
    origin = str(next(first.folder.glob("first/checkpoints/step-00000004/*")))
    second = train(*EIGHT, "--run-id", "second", "--resume-from-checkpoint", origin)
    assert second.code == 0, second.output
    assert "resumed from the checkpoint of step 4/8" in second.output
    assert state_of(open_store(first.folder / "second")) == state_of(open_store(first.folder / "first"))
    steps = [checkpoint.step for checkpoint in committed(open_store(first.folder / "second"))]
    assert steps == [8]
    again = train(*EIGHT, "--run-id", "second", "--resume-from-checkpoint", origin)
    assert "nothing to do" in again.output


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (("--adam-beta2", "0.95"), ["its optimizer is", "0.999", "0.95"]),
        (("--precision", "pure-bf16"), ["its --precision is 'bf16'", "'pure-bf16'"]),
        (("--dataset-name", "synthetic-gsm8k[train]"), ["training data (data_key) is", "--allow-data-change"]),
    ],
    ids=["optimizer", "precision", "data"],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_both_values(
    train: Train, other: tuple[str, ...], words: list[str]
) -> None:
    first = train("--max-steps", "1", "--run-id", "first")
    origin = str(next(first.folder.glob("first/checkpoints/*/*")))
    refused = train("--max-steps", "1", "--run-id", "second", "--resume-from-checkpoint", origin, *other)
    assert refused.code == 2
    assert all(word in refused.output for word in words), refused.output


def test_a_path_without_a_committed_checkpoint_is_refused_before_anything_is_loaded(
    train: Train, tmp_path: Path
) -> None:
    refused = train("--max-steps", "1", "--resume-from-checkpoint", str(tmp_path / "nowhere"))
    assert refused.code == 2
    assert "nowhere: there is no committed checkpoint" in refused.output
    assert not list(refused.folder.iterdir())


def test_a_clock_saves_besides_the_steps(train: Train) -> None:
    run = train("--max-steps", "5", "--save-steps", "0", "--save-minutes", "0.0001", "--save-total-limit", "9")
    assert run.code == 0, run.output
    assert [checkpoint.step for checkpoint in committed(open_store(run.run))] == [5, 4, 3, 2, 1]


@pytest.mark.parametrize("how", ["--async-save", "--no-async-save"])
def test_what_a_save_cost_is_said_and_recorded(train: Train, how: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="numina_finetune")
    run = train(*EIGHT, how)
    assert run.code == 0, run.output
    assert caplog.text.count("of which training stood still for") == 2
    saves = [record["checkpoint"] for record in run.metrics if "checkpoint" in record]
    assert [save["step"] for save in saves] == [4, 8]
    for save in saves:
        assert save["stall_seconds"] > 0
        assert save["bytes"] > 10_000_000
        if how == "--no-async-save":
            assert save["stall_seconds"] >= 0.9 * save["total_seconds"]


def test_the_best_by_evaluation_stays_and_a_missed_evaluation_is_made_up_for(train: Train) -> None:
    options = ("--max-steps", "8", "--save-steps", "2", "--eval-steps", "2", "--validation-size", "20")
    falling = train(*options, "--save-total-limit", "1")
    assert falling.code == 0, falling.output
    losses = {record["step"]: record["eval_loss"] for record in falling.metrics if "eval_loss" in record}
    assert sorted(losses) == [2, 4, 6, 8]
    best_known = min(list(losses)[:-1], key=losses.__getitem__)  # at the last commit
    assert [checkpoint.step for checkpoint in committed(open_store(falling.run))] == sorted({8, best_known})[::-1]
    # As if killed after the last save, before its evaluation.
    metrics = falling.run / "metrics.jsonl"
    kept = [line for line in metrics.read_text().splitlines() if '"eval_loss"' not in line or '"step": 8' not in line]
    metrics.write_text("\n".join(kept) + "\n")
    (falling.run / "model" / "config.json").unlink()
    again = train(*options, "--save-total-limit", "1")
    assert again.code == 0, again.output
    assert {record["step"]: record["eval_loss"] for record in again.metrics if "eval_loss" in record} == losses
