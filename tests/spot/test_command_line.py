"""``numina-finetune spot …`` as it is typed; what is wrong is told before anything is asked of the cloud."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from numina_finetune import cli
from numina_finetune.errors import ExitCode
from numina_finetune.option_fields import flag
from numina_finetune.spot import commands
from numina_finetune.spot.options import SpotOptions, job_of
from tests.conftest import ROOT, environment

TRAINING = ("--model-name", "tiny-qwen3", "--dataset-name", "openai/gsm8k", "--dataset-config", "main")
Told = Callable[..., str]


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """The supervisor's own options, without fault."""
    (tmp_path / "own.whl").write_text("")
    return [
        *("--output-dir", "gs://bucket/runs", "--run-id", "my-run", "--project", "my-project"),
        *("--zones", "us-east5-b", "--wheel", str(tmp_path / "own.whl")),
        *("--constraints", str(ROOT / "constraints.txt")),
    ]


@pytest.fixture
def no_cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gcloud that fails the test when it is started, and a store that cannot be opened."""
    program = tmp_path / "gcloud"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(commands, "open_store", lambda url: pytest.fail(f"{url} was opened"))


@pytest.fixture
def told(no_cloud: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], native_here: None) -> Told:
    """What a command that must be refused says."""

    def run(*arguments: str) -> str:
        assert cli.run_command(["spot", "run", *arguments]) == ExitCode.CONFIGURATION
        assert not (tmp_path / "asked").exists(), "the cloud was asked"
        said = capsys.readouterr().err
        assert said.startswith("numina-finetune: ") and "Traceback" not in said
        return said

    return run


def test_every_field_is_an_option_and_both_spellings_of_the_command_are_the_same(given: list[str]) -> None:
    env = {**environment(), "COLUMNS": "200"}

    def said(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], env=env, cwd=ROOT, capture_output=True, text=True, check=True, timeout=600
        )
        return done.stdout

    script = "scripts/spot_supervisor.py"
    text = said("-m", "numina_finetune", "spot", "run", "--help")
    assert all(flag(f.name) in text for f in fields(SpotOptions))
    assert said(script, "--help") == text
    planned = said("-m", "numina_finetune", "spot", "run", *given, "--dry-run", "--", *TRAINING)
    assert planned.startswith("gcloud storage buckets describe gs://bucket ")
    assert said(script, *given, "--dry-run", "--", *TRAINING) == planned
    assert said(script, "run", *given, "--dry_run", "--", *TRAINING) == planned


@pytest.mark.parametrize("slices", [1, 2])
def test_the_command_lines_of_a_whole_run(
    slices: int,
    tmp_path: Path,
    no_cloud: None,
    native_here: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Line by line; a run that really makes them is in test_killed_supervisors.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_hidden")
    for name in ("own.whl", "constraints.txt"):
        Path(name).touch()
    words = [
        *("--output-dir", "gs://bucket/runs", "--run-id", "my-run", "--project", "my-project", "--wheel", "own.whl"),
        *("--zones", "us-east5-b,us-east5-a", "--tpu", "v5litepod-16,v6e-16", "--num-slices", str(slices)),
    ]
    assert cli.run_command(["spot", "run", *words, "--dry-run", "--", *TRAINING]) == ExitCode.DONE
    golden = Path(__file__).parent / "golden" / f"{slices}_slices.txt"
    assert capsys.readouterr().out == golden.read_text(encoding="utf-8")


def test_everything_wrong_on_both_sides_of_the_dashes_is_told_at_once(told: Told, given: list[str]) -> None:
    said = told(
        *given, "--tpu", "v9-8", "--max-hours", "0", "--output-dir", "runs", "--", *TRAINING, "--warmup-ratio", "7"
    )
    for part in ("--tpu 'v9-8' is no TPU type", "--max-hours 0", "--output-dir runs is of this", "--warmup-ratio 7"):
        assert part in said


@pytest.mark.parametrize(
    ("training", "part"),
    [
        ((), "--dataset-name is missing"),
        (("--learning-rat", "1"), "after --: No such option: --learning-rat"),
        ((*TRAINING, "--max-steps", "many"), "after --: Invalid value for '--max-steps'"),
        ((*TRAINING, "--dataset-name", "./rows.jsonl"), "--dataset-name ./rows.jsonl is of this computer"),
        ((*TRAINING, "--model-name", str(ROOT)), f"--model-name {ROOT} is of this computer"),
        ((*TRAINING, "--config", "no.yaml"), "--config no.yaml cannot be read"),
        ((*TRAINING, "--dry-run"), "--dry-run among the training's options"),
        ((*TRAINING, "--run-id", "a"), "--run-id stands among the training's options"),
    ],
    ids=lambda value: " ".join(value)[-25:] if isinstance(value, tuple) else None,
)
def test_a_training_that_would_fail_on_the_machine_is_refused_before_there_is_one(
    told: Told, given: list[str], training: tuple[str, ...], part: str
) -> None:
    assert part in told(*given, "--", *training)


def test_a_run_id_that_can_be_no_folder_is_refused(told: Told, given: list[str]) -> None:
    assert "--run-id 'a/b' cannot name a folder" in told(*given, "--run-id", "a/b", "--", *TRAINING)


def test_a_run_without_a_name_gets_that_of_its_training(
    no_cloud: None, given: list[str], capsys: pytest.CaptureFixture[str], native_here: None
) -> None:
    place = given.index("--run-id")
    unnamed = [*given[:place], *given[place + 2 :], "--dry-run", "--"]

    def name(*training: str) -> str:
        assert cli.run_command(["spot", "run", *unnamed, *training]) == ExitCode.DONE
        return capsys.readouterr().out.split("--run-id ")[1].split()[0]

    assert name(*TRAINING) == name(*TRAINING, "--logging-steps", "1")
    assert name(*TRAINING).startswith("tiny-qwen3-")
    assert name(*TRAINING) != name(*TRAINING, "--seed", "1")


def test_the_file_of_options_goes_to_the_workers(tmp_path: Path, given: list[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("max_steps: 7\n")
    options = SpotOptions(output_dir="gs://b/runs", run_id="r", wheel="own.whl")
    for words in (("--config", str(recipe)), (f"--config={recipe}",)):
        job = job_of(options, (*words, "--seed", "1"), {})
        assert job.scripts["training.yaml"] == "max_steps: 7\n"
        assert str(tmp_path) not in " ".join(job.train) and "training.yaml" in " ".join(job.train)


@pytest.mark.parametrize("command", ["status", "logs", "stop", "clean", "report"])
def test_a_place_without_a_run_is_told_by_every_command(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run_command(["spot", command, str(tmp_path)]) == ExitCode.CONFIGURATION
    assert f"{tmp_path} is no run of spot run" in capsys.readouterr().err
