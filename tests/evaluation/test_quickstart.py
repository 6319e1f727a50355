"""What the quickstart checks and draws around the training, without the training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from numina_finetune import quickstart
from numina_finetune.checks import config_faults
from numina_finetune.errors import ConfigError, ExitCode
from numina_finetune.evaluation.scoring import Figures, figures, grade
from numina_finetune.evaluation.solving import Attempt
from numina_finetune.evaluation.tasks import Problem
from numina_finetune.torch_native.backend import NativeBackend
from numina_finetune.train.plots import plot_loss, read_lives, smooth
from tests.conftest import environment


def write_metrics(path: Path, records: list[tuple[int, int, float]], tail: str = "") -> Path:
    lines = [json.dumps({"step": step, "life": life, "loss": loss}) + "\n" for step, life, loss in records]
    path.write_text("".join(lines) + tail, encoding="utf-8")
    return path


def accuracy(right: int, problems: int) -> Figures:
    """Of a model that answers so many problems right."""
    asked = Problem("0", "1?", "1", "#### 1")
    texts = ["#### 1"] * right + ["?"] * (problems - right)
    return figures([grade(asked, [Attempt(text, 1, "answered")], ["gsm8k"]) for text in texts], "gsm8k")


def test_its_settings_are_free_of_faults_and_its_command_says_each_of_them(tmp_path: Path) -> None:
    config = quickstart.quickstart_config(tmp_path, 40)
    assert config_faults(config) == []
    options = quickstart.command_line(config)
    for option in ("--model-name=tiny-qwen3", "--max-steps=40", "--mesh=fsdp=4", "--remat=none"):
        assert option in options
    assert not any(option.startswith("--seed") for option in options)


def test_a_folder_with_an_earlier_quickstart_is_refused_rather_than_continued(tmp_path: Path) -> None:
    (tmp_path / "tiny-qwen3").mkdir()
    with pytest.raises(ConfigError, match="already holds a quickstart"):
        quickstart.run_quickstart(tmp_path, NativeBackend)


@pytest.mark.slow
def test_the_command_alone_shows_all_of_it(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "numina_finetune", "quickstart"]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "quickstart-run" / "tiny-qwen3"
    found = json.loads((run / "quickstart.json").read_text(encoding="utf-8"))
    assert found["preempted_at"] and (run / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(("right", "code"), [(240, ExitCode.DONE), (130, ExitCode.CRASHED)])
def test_it_succeeds_only_where_the_interval_lies_above_one_half(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], right: int, code: ExitCode
) -> None:
    measured = quickstart.Figures(
        before=accuracy(0, 256),
        after=accuracy(right, 256),
        preempted_at=20,
        steps=40,
        seconds={"total": 1.0},
    )
    assert quickstart._verdict(measured, tmp_path) == code
    assert ("not proven" in capsys.readouterr().out) is (code != ExitCode.DONE)


def test_lives_that_leave_out_or_repeat_steps_fail_it(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.jsonl", [(1, 1, 3.0), (2, 1, 2.0), (3, 2, 1.0), (4, 2, 1.0)])
    quickstart._check_one_course(tmp_path, 4, 2)
    with pytest.raises(quickstart.StageFailed, match="do not make 5 steps"):
        quickstart._check_one_course(tmp_path, 5, 2)


def test_the_loss_curve_is_drawn_from_whole_lines_of_training_steps(tmp_path: Path) -> None:
    path = write_metrics(tmp_path / "metrics.jsonl", [(1, 1, 3.0), (2, 1, 2.0), (2, 2, 1.5)], '{"step": 2, "eval_l')
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps({"step": 2, "eval_loss": 1.0, "life": 2}) + "\n")
    assert [(life.number, life.steps, life.losses) for life in read_lives(path)] == [(1, [1], [3.0]), (2, [2], [1.5])]
    plot_loss(path, tmp_path / "plots" / "loss.png", title="loss", marks=[1])
    assert (tmp_path / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_a_step_has_no_curve(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no training step"):
        read_lives(write_metrics(tmp_path / "metrics.jsonl", []))


def test_smoothing_keeps_a_constant_and_skips_what_is_not_finite() -> None:
    losses = np.full(100, 2.0)
    losses[50] = np.nan
    np.testing.assert_allclose(smooth(losses), 2.0)
