"""``evaluate`` and ``compare`` as commands: models, runs, options, kills."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from numina_finetune import cli
from tests.conftest import environment, train
from tests.programs import Program, run_module

TINY = ("--model", "tiny-qwen3", "--task", "synthetic-gsm8k", "--max-new-tokens", "16")


def evaluate(*arguments: str) -> int:
    return cli.run_command(["evaluate", *arguments])


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return found


def lines(folder: Path) -> int:
    path = folder / "problems.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


@pytest.mark.usefixtures("native_here")
def test_everything_that_is_wrong_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ("--samples", "4", "--prompt", "poem", "--shots", "-1", "--top-p", "2", "--answer-style", "latex")
    assert evaluate(*wrong, "--checkpoint", "last") == 2
    told = capsys.readouterr().err
    for fault in (
        *("--model is missing", "--task is missing", "--output-dir is missing", "--samples 4 would all be the same"),
        *("--prompt 'poem'", "--shots -1", "--top-p 2.0", "--answer-style 'latex'", "--checkpoint 'last'"),
    ):
        assert fault in told
    assert "Traceback" not in told


@pytest.mark.usefixtures("native_here")
def test_what_a_model_cannot_take_is_refused_before_it_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(*TINY[:-1], "4096", "--output-dir", str(tmp_path / "out")) == 2
    assert "is more than the 4096 positions of tiny-qwen3" in capsys.readouterr().err
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert evaluate("--model", str(tmp_path / "adapter"), *TINY[2:], "--output-dir", str(tmp_path / "out")) == 2
    assert "holds adapters alone" in capsys.readouterr().err
    nowhere = ("--model", str(tmp_path), "--task", "nowhere.jsonl", "--backend", "native")
    assert evaluate(*nowhere, "--output-dir", str(tmp_path / "out")) == 2
    told = capsys.readouterr().err
    assert "there is no run" in told and "--task nowhere.jsonl does not exist" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("native_here")
def test_an_evaluation_is_repeated_refused_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = (*TINY, "--max-problems", "5")
    drawn = ("--temperature", "1", "--samples", "2", "--top-k", "20")
    a, b = tmp_path / "a", tmp_path / "b"
    assert evaluate(*few, *drawn, "--output-dir", str(a)) == 0
    assert evaluate(*few, *drawn, "--output-dir", str(b), "--batch-size", "4") == 0
    assert summary(a) == summary(b), "what is drawn does not depend on what is decoded together"
    assert summary(a)["figures"]["gsm8k"]["pass_at"].keys() == {"2"}
    capsys.readouterr()
    assert evaluate(*few, *drawn, "--output-dir", str(a)) == 0
    assert "5 problems, 0 to do" in capsys.readouterr().out
    assert evaluate(*few, *drawn, "--output-dir", str(a), "--seed", "1") == 2
    assert "seed 0, this command has 1" in capsys.readouterr().err
    assert cli.run_command(["compare", str(a), str(b), "--output-dir", str(tmp_path / "both")]) == 0
    assert "+0.0 points over 5 problems" in capsys.readouterr().out
    assert (tmp_path / "both" / "comparison.html").is_file()
    before = sorted(tmp_path.rglob("*"))
    assert cli.run_command(["compare", str(a), str(b)]) == 0
    assert sorted(tmp_path.rglob("*")) == before, "printed, where no folder is named"


@pytest.mark.usefixtures("native_here")
def test_examples_and_completions_are_evaluated(tmp_path: Path) -> None:
    few = (*TINY, "--max-problems", "2", "--shots", "2", "--prompt", "completion")
    assert evaluate(*few, "--output-dir", str(tmp_path / "out")) == 0
    assert summary(tmp_path / "out")["settings"]["examples"].startswith("2, sha256")


@pytest.mark.usefixtures("native_here")
def test_a_run_its_export_and_its_best_checkpoint_are_evaluated_alike(tmp_path: Path) -> None:
    options = ("--max-steps", "4", "--save-steps", "2", "--eval-steps", "2", "--validation-size", "8")
    run = train(tmp_path / "runs", *options, "--backend", "native", env=environment())
    assert run.code == 0, run.output
    few = (*TINY[2:], "--max-problems", "8")
    for name, model in (("run", run.run), ("export", run.run / "model"), ("best", run.run)):
        checkpoint = ("--checkpoint", "best") if name == "best" else ()
        assert evaluate("--model", str(model), *few, *checkpoint, "--output-dir", str(tmp_path / name)) == 0
    said = [(tmp_path / name / "problems.jsonl").read_text(encoding="utf-8") for name in ("run", "export")]
    assert said[0] == said[1]
    assert summary(tmp_path / "run")["settings"]["checkpoint"] == "step 4, attempt 1"
    assert summary(tmp_path / "best")["settings"]["checkpoint"].startswith("step ")


@pytest.mark.slow
def test_a_whole_task_is_asked_as_it_is_where_nothing_else_is_said(tmp_path: Path) -> None:
    words = ("evaluate", "--model", "tiny-qwen3", "--task", "synthetic-gsm8k", "--output-dir", str(tmp_path / "out"))
    asked = run_module("numina_finetune", *words, env=environment(), timeout=3000)
    assert asked.returncode == 0, asked.stderr
    assert lines(tmp_path / "out") == 256 and (tmp_path / "out" / "report.html").is_file()


def test_killed_it_goes_on_where_it_was(tmp_path: Path) -> None:
    words = ["evaluate", *TINY, "--max-problems", "40", "--batch-size", "4", "--output-dir", str(tmp_path / "cut")]
    process = Program("numina_finetune", *words, env=environment())
    while lines(tmp_path / "cut") < 8:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = lines(tmp_path / "cut")
    assert done < 40
    second = run_module("numina_finetune", *words, env=environment())
    assert second.returncode == 0, second.stderr
    left = int(second.stdout.partition("problems, ")[2].partition(" to do")[0])
    assert 0 < left <= 40 - done + 1, "all but the line that was cut, if one was"
    assert lines(tmp_path / "cut") == 40 and summary(tmp_path / "cut")["figures"]["gsm8k"]["problems"] == 40
