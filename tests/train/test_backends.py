"""What both backends owe the loop, tried on the live model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, environment

DEVICES = [pytest.param(None, id="native"), pytest.param(4, id="xla-4-devices")]


def live(task: str, folder: Path, devices: int | None, *options: str) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, "-m", "tests.train.live", task, str(folder), *options],
        env=environment(devices=devices),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("devices", DEVICES)
def test_the_exported_model_gives_the_trained_models_logits(tmp_path: Path, devices: int | None) -> None:
    result = live("export", tmp_path, devices)
    assert result["trained"]
    assert result["largest_difference"] < 1e-5 * max(1.0, result["scale"])


def test_a_bf16_run_keeps_fp32_masters_and_exports_what_it_computed_with(tmp_path: Path) -> None:
    result = live("export", tmp_path, 4, "precision=bf16")
    assert result["dtype"] == "torch.bfloat16"
    assert result["trained"]
    # Two programs round bf16 in different places; masters of another type would be off by far more.
    assert result["largest_difference"] < 0.05 * max(1.0, result["scale"])


@pytest.mark.parametrize("devices", DEVICES)
def test_a_non_finite_step_changes_nothing_and_is_reported(tmp_path: Path, devices: int | None) -> None:
    result = live("nonfinite", tmp_path, devices)
    assert result == {"applied": [True, False, True], "unchanged": True, "moved": True}


def test_a_resume_waits_for_the_placement_that_is_still_under_way(tmp_path: Path) -> None:
    assert live("reload", tmp_path, 4)["loaded"] == [True] * 25


@pytest.mark.parametrize("devices", DEVICES)
def test_micro_batches_weigh_by_their_supervised_tokens(tmp_path: Path, devices: int | None) -> None:
    result = live("uneven", tmp_path, devices)
    assert result["cut"] == pytest.approx(result["whole"], rel=1e-5)
