"""A pipeline behind ``spot run … --``: checked before a machine is asked for, and kept alive over lost ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

import pytest

from numina_finetune import cli
from numina_finetune.errors import ExitCode
from numina_finetune.spot.clock import RealClock
from numina_finetune.spot.job import Job
from numina_finetune.spot.options import SpotOptions, job_of
from numina_finetune.spot.watch import Watch
from numina_finetune.storage import open_store
from tests.conftest import ROOT
from tests.gcs import gcs
from tests.pipeline.bench import TINY, Pipeline
from tests.spot.bench import Bench, Strike


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY, encoding="utf-8")
    return path


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """The supervisor's own options, without fault."""
    (tmp_path / "own.whl").write_text("")
    return [
        *("spot", "run", "--output-dir", "gs://bucket/runs", "--project", "my-project", "--zones", "us-east5-b"),
        *("--wheel", str(tmp_path / "own.whl"), "--constraints", str(ROOT / "constraints.txt"), "--dry-run"),
    ]


def test_its_file_goes_to_the_workers_and_its_name_is_the_runs(
    file: Path, given: list[str], capsys: pytest.CaptureFixture[str], native_here: None
) -> None:
    assert cli.run_command([*given, "--", "run", str(file)]) == ExitCode.DONE
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("numina-finetune run pipeline.yaml --output-dir gs://bucket/runs --run-id tiny")
    job = job_of(SpotOptions(output_dir="gs://bucket/runs", run_id="tiny", wheel="own.whl"), ["run", str(file)], {})
    assert job.scripts["pipeline.yaml"] == TINY


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("max_seq_length: 128", "max_seq_length: 1", "step data: --max-seq-length 1 is too small"),
        ("model_name: tiny-qwen3", "model_name: /models/own", "step cot: --model-name /models/own is of this computer"),
        ("kind: export", "kind: fly", "step 3: kind is 'fly'"),
    ],
)
def test_what_cannot_work_on_a_worker_is_refused_before_there_is_one(
    file: Path, given: list[str], old: str, new: str, said: str, capsys: pytest.CaptureFixture[str], native_here: None
) -> None:
    file.write_text(TINY.replace(old, new), encoding="utf-8")
    assert cli.run_command([*given, "--", "run", str(file)]) == ExitCode.CONFIGURATION
    assert said in capsys.readouterr().err


def test_options_of_run_are_not_the_supervisors(
    file: Path, given: list[str], capsys: pytest.CaptureFixture[str], native_here: None
) -> None:
    assert cli.run_command([*given, "--", "run", str(file), "--only", "cot"]) == ExitCode.CONFIGURATION
    assert "give run and the pipeline's file, and no option" in capsys.readouterr().err


def test_checkpoints_of_all_its_trainings_are_progress(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    watch = Watch(*cast(Any, (None, None)), store, cast(Any, None), RealClock())
    assert watch.saved_step() == 0
    for name in (
        "cot-1/checkpoints/step-00000004",
        "cot-1/checkpoints/step-00000008",
        "tir-1/checkpoints/step-00000002",
    ):
        store.write(f"{name}/attempt-1/COMMITTED", b"")
    store.write("tir-1/checkpoints/step-00000006/attempt-1/state/part", b"")
    assert watch.saved_step() == 10


@pytest.mark.slow
def test_a_pipeline_that_loses_its_machines_goes_on_and_is_done_once(tmp_path: Path, file: Path) -> None:
    file.write_text(TINY.replace("max_steps: 3", "max_steps: 30\n      logging_steps: 1"), encoding="utf-8")
    with gcs() as service, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", service.environment["STORAGE_EMULATOR_HOST"])
        pipeline = Pipeline(file, f"{service.url}/runs")
        bench = Bench(
            tmp_path,
            Job(("true",), (sys.executable, "-m", "numina_finetune", *pipeline.words)),
            f"{service.url}/runs/tiny",
            strikes={1: Strike("kill", 4), 2: Strike("preempt", 3)},
            notice_seconds=30.0,
            poll_seconds=0.3,
            grace_seconds=6.0,
            stall_seconds=900.0,  # two commands begin before the first step
            fits=[{**service.environment, "ACCELERATE_USE_CPU": "1"}],
            service=service,
        )
        assert bench.supervisor().run() == ExitCode.DONE, "\n".join(bench.told)
        assert bench.cloud.trace == bench.expected_trace(3)
        assert (bench.cloud.machines(), bench.processes()) == ([], [])
        spent = bench.record.spent
        assert (spent.preemptions, spent.restarts, spent.saved_step) == (2, 0, 30)
        lives = {name: [life.code for life in record.lives] for name, record in pipeline.records().items()}
        assert lives == {"data": [0], "cot": [None, 42, 0], "export": [0]}
        store = open_store(pipeline.steps["cot"].location.url)
        steps = [json.loads(line) for line in store.read("metrics.jsonl").decode().splitlines()]
        assert [one["step"] for one in steps if "loss" in one] == list(range(1, 31)), "each step counts once"
