"""Pipelines that are really run: each step once, whatever ends them in between."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from numina_finetune import claims, cli
from numina_finetune.claims import lock_folder
from numina_finetune.errors import ExitCode
from numina_finetune.pipeline.executor import LOCK
from numina_finetune.pipeline.records import BEGUN, DONE, RECORD
from tests.conftest import ROOT, environment
from tests.gcs import Gcs, gcs
from tests.pipeline.bench import TINY, Pipeline, kill_tree, wait_until

SECOND_STAGE = """
  - name: tir
    kind: train
    options:
      <<: *data
      model_name: ${cot.model}
      cache_dir: ${data.cache}
      per_device_train_batch_size: 1
      backend: native
      max_steps: 2
      metadata_url: none
  - name: answers
    kind: evaluate
    options: {model: "${tir.model}", task: synthetic-gsm8k, max_problems: 2, max_new_tokens: 2, backend: native}
"""
QUICKSTART = ROOT / "configs" / "pipelines" / "quickstart.yaml"


def tiny(folder: Path, output_dir: str | None = None, **env: str) -> Pipeline:
    path = folder / "tiny.yaml"
    path.write_text(TINY, encoding="utf-8")
    return Pipeline(path, output_dir or str(folder / "out"), environment(XDG_CACHE_HOME=str(folder / "cache"), **env))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """The tiny pipeline, run to its end by this process."""
    pipeline = tiny(tmp_path_factory.mktemp("pipeline"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PJRT_DEVICE", "CPU_NUM_DEVICES", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
            patch.delenv(name, raising=False)
        for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "PYTHONPATH", "XDG_CACHE_HOME"):
            patch.setenv(name, pipeline.env[name])
        assert cli.run_command(pipeline.words) == ExitCode.DONE
        yield pipeline


def test_each_step_has_its_turn_once_and_leaves_what_the_next_one_takes(ran: Pipeline) -> None:
    for name, record in ran.records().items():
        assert (record.state, [life.code for life in record.lives]) == (DONE, [0]), name
        assert record.seconds > 0
        assert record.outputs == ran.steps[name].outputs
    assert [record["step"] for record in ran.metrics("cot")] == [1, 2, 3]
    assert ran.records()["cot"].figures["loss"] == ran.metrics("cot")[-1]["loss"]
    assert any((ran.folder("data") / "cache").iterdir())
    assert not (Path(ran.env["XDG_CACHE_HOME"]) / "numina_finetune").exists(), "the training tokenised nothing itself"
    assert (ran.folder("export") / "model" / "model.safetensors").is_file()
    outcome = json.loads((Path(ran.output_dir) / "tiny" / "attempts" / "1" / "outcome.json").read_text("utf-8"))
    assert outcome["kind"] == "done"


def test_given_again_it_runs_nothing_and_says_so(ran: Pipeline, capfd: pytest.CaptureFixture[str]) -> None:
    before = ran.records()
    assert cli.run_command(ran.words) == ExitCode.DONE
    assert ran.records() == before
    assert capfd.readouterr().out.count("done before") == 2 * len(before), "as it goes, and in the table"


def test_the_list_shows_what_a_changed_option_would_run(
    ran: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "tiny.yaml"
    other.write_text(TINY.replace("dtype: bf16", "dtype: fp32"), encoding="utf-8")
    assert cli.run_command(["run", str(other), "--output-dir", ran.output_dir, "--list"]) == ExitCode.DONE
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(line[0], line[2]) for line in lines[1:]] == [("data", "done"), ("cot", "done"), ("export", "not")]
    assert lines[1][-1] == str(ran.folder("data"))
    named = ["run", str(ran.file), "--output-dir", ran.output_dir, "--run-id", "other", "--list"]
    assert cli.run_command(named) == ExitCode.DONE
    assert str(Path(ran.output_dir) / "other" / "cot-") in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert cli.run_command(["run", str(ran.file), "--list"]) == ExitCode.DONE
    assert str(Path("runs", "tiny", "cot-")) in capsys.readouterr().out, "where no place is named"
    assert cli.run_command([*named[:-2], "a/b"]) == ExitCode.CONFIGURATION
    assert "--run-id 'a/b' cannot name a folder" in capsys.readouterr().err


def test_a_step_alone_needs_those_before_it(ran: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", str(ran.file), "--output-dir", str(tmp_path), "--only"]
    assert cli.run_command([*words, "export"]) == ExitCode.CONFIGURATION
    assert "--only export needs the outputs of step cot, which is not done" in capsys.readouterr().err
    assert cli.run_command([*words, "sft"]) == ExitCode.CONFIGURATION
    assert "--only sft is no step: there are data, cot, export" in capsys.readouterr().err


def test_a_second_one_in_the_same_place_waits_and_is_refused(
    ran: Pipeline, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "LOCK_PATIENCE", 0.5)
    with lock_folder(Path(ran.output_dir) / "tiny", LOCK, "the first one"):
        assert cli.run_command(ran.words) == ExitCode.CONFIGURATION
    assert "another run of this pipeline, or a step of one, is at work there" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "kind"), [(signal.SIGTERM, 42, "preempted"), (signal.SIGINT, 130, "stopped")]
)
def test_a_notice_reaches_the_step_which_saves_and_the_pipeline_ends_with_its_code(
    tmp_path: Path, number: int, code: int, kind: str
) -> None:
    pipeline = tiny(tmp_path)
    pipeline.file.write_text(TINY.replace("max_steps: 3", "max_steps: 4000"), encoding="utf-8")
    process = pipeline.start()
    metrics = pipeline.folder("cot") / "metrics.jsonl"
    wait_until(lambda: metrics.is_file() and len(metrics.read_text("utf-8").splitlines()) > 5, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == code, output
    record = pipeline.records()["cot"]
    assert (record.state, [life.code for life in record.lives]) == (BEGUN, [code])
    for place in (pipeline.folder("cot"), Path(pipeline.output_dir) / "tiny"):
        outcome = json.loads((place / "attempts" / "1" / "outcome.json").read_text("utf-8"))
        assert outcome["kind"] == kind
    saved = [int(path.parts[-3].removeprefix("step-")) for path in pipeline.folder("cot").rglob("COMMITTED")]
    assert max(saved) == pipeline.metrics("cot")[-1]["step"], "it saved before it ended"


@pytest.mark.slow
def test_the_quickstarts_pipeline_killed_in_each_step_and_run_again_does_nothing_twice(tmp_path: Path) -> None:
    pipeline = Pipeline(QUICKSTART, str(tmp_path / "out"), environment(XDG_CACHE_HOME=str(tmp_path / "cache")))
    saved, answered = dict[str, int](), list[str]()
    for name, step in pipeline.steps.items():
        process = pipeline.start()
        folder = pipeline.folder(name)
        wait_until(lambda folder=folder: (folder / RECORD).is_file(), process)
        if step.kind == "train":
            wait_until(lambda folder=folder: any(folder.rglob("COMMITTED")), process)
        if step.kind == "evaluate":
            problems = folder / "problems.jsonl"
            wait_until(lambda problems=problems: problems.is_file() and problems.stat().st_size > 0, process)
        kill_tree(process)
        if step.kind == "train":
            saved[name] = max(int(path.parts[-3].removeprefix("step-")) for path in folder.rglob("COMMITTED"))
            assert 0 < saved[name] < step.options["max_steps"], "the kill came too late to show anything"
        if step.kind == "evaluate":
            answered = problems.read_text("utf-8").splitlines()
    process = pipeline.start()
    output, _ = process.communicate(timeout=600)
    assert process.returncode == ExitCode.DONE, output
    for name, record in pipeline.records().items():
        assert record.state == DONE
        assert [life.code for life in record.lives] == [None, 0], f"{name}: killed once, and then done"
    for name in ("cot", "tir"):
        lives: dict[int, list[int]] = {}
        for one in pipeline.metrics(name):
            lives.setdefault(one["life"], []).append(one["step"])
        assert list(lives) == [1, 2]
        last = pipeline.steps[name].options["max_steps"]
        assert lives[2] == list(range(saved[name] + 1, last + 1)), "it went on behind the checkpoint"
    lines = (pipeline.folder("answers") / "problems.jsonl").read_text("utf-8").splitlines()
    assert lines[: len(answered)] == answered and len(answered) < len(lines) == 64
    assert len({json.loads(line)["id"] for line in lines}) == 64, "no problem was asked twice"
    assert json.loads((pipeline.folder("export") / "model" / "config.json").read_text("utf-8"))["dtype"] == "bfloat16"


@pytest.mark.slow
def test_a_training_asked_for_another_form_of_its_model_gives_it_without_training_again(tmp_path: Path) -> None:
    pipeline = tiny(tmp_path)
    text = TINY.replace("max_steps: 3", "max_steps: 3\n      lora_rank: 2\n      lora_export: merged")
    for form in ("merged", "both"):
        pipeline.file.write_text(text.replace("merged", form), encoding="utf-8")
        process = pipeline.start()
        output, _ = process.communicate(timeout=600)
        assert process.returncode == ExitCode.DONE, output
    records = pipeline.records()
    assert [life.code for life in records["cot"].lives] == [0, 0]
    assert {one["life"] for one in pipeline.metrics("cot")} == {1}
    assert set(records["cot"].outputs) == {"run", "model", "adapter"}
    assert len(records["export"].lives) == 1


@pytest.mark.slow
def test_two_processes_of_a_launcher_train_together_and_the_first_one_does_the_rest(tmp_path: Path) -> None:
    pipeline = tiny(tmp_path, ACCELERATE_USE_CPU="1")
    text = TINY + '  - {name: answers, kind: evaluate, options: {model: "${cot.model}", task: synthetic-gsm8k}}\n'
    text = text.replace("task: ", "backend: native, max_problems: 4, max_new_tokens: 4, task: ")
    pipeline.file.write_text(text, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = pipeline.start(launcher=torchrun)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    assert output.count("native torch on cpu, 2 process(es)") == 2, "once a training, once an evaluation"
    for name, record in pipeline.records().items():
        assert (record.state, [life.code for life in record.lives]) == (DONE, [0]), name
    assert [path.name for path in (pipeline.folder("cot") / "attempts").iterdir()] == ["1"]


@pytest.mark.slow
def test_in_a_bucket_a_killed_pipeline_goes_on_and_leaves_no_half_of_an_export(tmp_path: Path) -> None:
    with gcs() as service:
        pipeline = tiny(tmp_path, f"{service.url}/runs", **service.environment)
        second_stage = TINY.replace("  - name: export", SECOND_STAGE + "  - name: export")
        pipeline.file.write_text(second_stage.replace("${cot.run}", "${tir.run}"), encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STORAGE_EMULATOR_HOST", service.environment["STORAGE_EMULATOR_HOST"])
            _killed_in_its_export(pipeline, service)


def _killed_in_its_export(pipeline: Pipeline, service: Gcs) -> None:
    delayed = service.fault("delay", r"export-\w+/model/config.json", seconds=600.0)
    first = pipeline.start()
    wait_until(lambda: delayed.times == 0, first)
    kill_tree(first)
    service.clear()
    second = pipeline.start()
    output, _ = second.communicate(timeout=600)
    assert second.returncode == ExitCode.DONE, output
    lives = {name: [life.code for life in record.lives] for name, record in pipeline.records().items()}
    assert lives == {"data": [0], "cot": [0], "tir": [0], "answers": [0], "export": [None, 0]}
