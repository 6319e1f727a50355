"""What trackers are told: one run of theirs for all lives of ours, read back from their own files."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from numina_finetune.checks import config_faults
from numina_finetune.config import RunConfig, SourceConfig
from numina_finetune.run_report.command import run_report
from numina_finetune.train.provenance import git_state, redacted
from numina_finetune.train.trackers import missing_trackers
from tests.conftest import ROOT, Run, environment, train

pytest.importorskip("wandb")
pytest.importorskip("tensorboard")

STEPS = ("--max-steps", "6", "--save-steps", "3", "--logging-steps", "1", "--run-id", "tracked")


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two lives: the first made all six steps, and its last checkpoint was never committed, as if killed before."""
    folder = tmp_path_factory.mktemp("tracked") / "out"
    env = environment(WANDB_MODE="offline")
    secret = "http://user:hunter2@localhost:1/metadata"
    options = (*STEPS, *("--report-to", "wandb,tensorboard", "--tracker-group", "trials", "--metadata-url", secret))
    first = train(folder, *options, env=env)
    assert first.code == 0, first.output
    (first.checkpoints[-1] / "COMMITTED").unlink()
    second = train(folder, *options, env=env)
    assert second.code == 0, second.output
    assert "resumed from the checkpoint of step 3/6" in second.output
    return second


# --- wandb ------------------------------------------------------------------------------------------------------------


def test_a_resumed_run_continues_the_same_wandb_run(resumed: Run) -> None:
    first, second = (records(path) for path in sorted(resumed.run.glob("wandb/offline-run-*/*.wandb")))
    begun = [next(record.run for record in life if record.HasField("run")) for life in (first, second)]
    assert begun[0].run_id == begun[1].run_id and begun[0].run_id.startswith("tracked-")
    assert {(run.run_group, run.project, run.display_name) for run in begun} == {
        ("trials", "numina_finetune", "tracked")
    }
    assert [logged_steps(life) for life in (first, second)] == [[1, 2, 3, 4, 5, 6], [4, 5, 6]]


def test_wandb_gets_settings_data_versions_and_commit_without_secrets(resumed: Run) -> None:
    path = min(resumed.run.glob("wandb/offline-run-*/*.wandb"))
    said: dict[str, Any] = {}
    for record in records(path):
        for update in [*record.run.config.update, *record.config.update]:
            said[update.key or update.nested_key[0]] = json.loads(update.value_json)
    assert said["config"]["learning_rate"] == 2e-5
    assert said["data"]["sources"][0]["rows"] == 256
    assert {"python", "torch"} <= set(said["versions"])
    assert b"hunter2" not in path.read_bytes()
    record = (resumed.run / "run.yaml").read_text(encoding="utf-8")
    assert "hunter2" not in record and "http://***@localhost:1/metadata" in record
    assert said["git"] == yaml.safe_load(record)["git"]


def test_a_tracker_that_cannot_start_is_told_once_and_training_goes_on(tmp_path: Path) -> None:
    env = environment(WANDB_MODE="online", WANDB_API_KEY="", HOME=str(tmp_path), WANDB_BASE_URL="http://localhost:1")
    run = train(tmp_path / "out", *STEPS, "--report-to", "wandb", env=env)
    assert run.code == 0, run.output
    assert run.output.count("--report-to wandb failed") == 1
    assert len(run.losses) == 6


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def test_tensorboard_shows_every_step_of_a_resumed_run_once(resumed: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(resumed.run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    recorded = {record["step"]: record["loss"] for record in resumed.metrics if "loss" in record}
    for event in events.Scalars("loss"):
        assert event.value == pytest.approx(recorded[event.step], rel=1e-6)
    assert "learning_rate: 2.0e-05" in events.Tensors("run/text_summary")[0].tensor_proto.string_val[0].decode()


# --- the run's own account --------------------------------------------------------------------------------------------


def test_steps_made_again_are_on_record_as_lost(resumed: Run) -> None:
    (lost,) = [record for record in resumed.metrics if "lost" in record]
    assert (lost["step"], lost["life"]) == (3, 2)
    assert (lost["lost"]["life"], lost["lost"]["steps"]) == (1, 3)
    assert lost["lost"]["seconds"] > 0


def test_the_page_of_a_resumed_run_has_its_lives_and_pictures(resumed: Run, tmp_path: Path) -> None:
    assert run_report(str(resumed.folder), str(tmp_path / "page.html")) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<td>1 to 3</td>" in page and "<td>4 to 6</td>" in page, "steps that count, by life"
    assert page.count("data:image/png;base64,") == 2 * 7
    assert "http://***@localhost:1/metadata" in page
    assert "src=" not in page.replace('src="data:', ""), "nothing is fetched from elsewhere"


def test_the_record_names_the_users_commit(resumed: Run, tmp_path: Path) -> None:
    record, here = yaml.safe_load((resumed.run / "run.yaml").read_text(encoding="utf-8")), git_state(ROOT)
    assert (record["git"] or {}).get("commit") == (here or {}).get("commit")
    assert git_state(tmp_path) is None


def test_changed_files_make_a_commit_dirty_and_new_ones_do_not(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", *words], cwd=tmp_path, check=True)

    git("init", "-q")
    (tmp_path / "tracked").write_text("1", encoding="utf-8")
    git("add", ".")
    git("commit", "-qm", "first")
    (tmp_path / "runs").write_text("new", encoding="utf-8")
    state = git_state(tmp_path)
    assert state is not None and not state["dirty"] and len(state["commit"]) == 40
    (tmp_path / "tracked").write_text("2", encoding="utf-8")
    assert git_state(tmp_path) == {**state, "dirty": True}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pass@host/data.jsonl", "https://***@host/data.jsonl"),
        ("hf_abcdefghijklmnopqrstuv", "***"),
        ("https://host/rows?split=a&token=abc", "https://host/rows?split=a&token=***"),
        ("openai/gsm8k", "openai/gsm8k"),
    ],
)
def test_what_looks_like_a_secret_is_not_written_down(text: str, shown: str) -> None:
    assert redacted({"a": [text]}) == {"a": [shown]}


# --- options ----------------------------------------------------------------------------------------------------------


def test_a_tracker_that_is_not_installed_is_refused_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (fault,) = missing_trackers(RunConfig(report_to="wandb"))
    assert "--report-to wandb" in fault and "numina_finetune[train]" in fault


def test_a_group_without_wandb_is_refused() -> None:
    config = RunConfig("tiny-qwen3", datasets=(SourceConfig("a"),), output_dir="o", tracker_group="trials")
    assert config_faults(config) == [
        "--tracker-group trials is for wandb, which is not asked for: add --report-to wandb"
    ]


# --- reading wandb's file ---------------------------------------------------------------------------------------------


def records(path: Path) -> list[Any]:
    """Of a ``.wandb`` file: a log as LevelDB writes it (blocks of 32 KiB, records in pieces), behind a header."""
    from wandb.proto import wandb_internal_pb2

    found, data = [], bytearray()
    for kind, piece in _pieces(path.read_bytes()):
        data += piece
        if kind in (1, 4):  # whole, or the last piece
            found.append(wandb_internal_pb2.Record.FromString(bytes(data)))
            data.clear()
    return found


def logged_steps(life: list[Any]) -> list[int]:
    """Steps of which the loss was logged."""
    return [
        record.history.step.num
        for record in life
        if record.HasField("history") and any("loss" in (item.key, *item.nested_key) for item in record.history.item)
    ]


def _pieces(data: bytes) -> Iterator[tuple[int, bytes]]:
    place = 7  # ":W&B", a magic number and a version
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        yield kind, data[place + 7 : place + 7 + length]
        place += 7 + length
