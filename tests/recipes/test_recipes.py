"""What users run trains: every recipe and the bare command, as they are but for sizes, on each kind of device."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import Run, environment, train_as
from tests.recipes.settings import DEVICES, STEPS, Setting, settings
from tests.xla.test_hygiene import CLEAN

OFTEN = ("bare", "numina_tir_gpt_oss_20b_lora")
"""A model whose weights are all trained, and one with experts and adapters: the others where there is time."""
APART = 0.02
"""How far a step's loss on XLA may be from its native one, in nats, of about six."""

Found = Callable[[Setting, int | None], Run]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The run of a setting on so many XLA devices, or natively."""
    folder = tmp_path_factory.mktemp("recipes")

    @cache
    def of(name: str, devices: int | None) -> Run:
        setting = next(setting for setting in settings() if setting.name == name)
        place, env = folder / f"{name}, {devices or 'native'}", environment(devices=devices, XDG_CACHE_HOME=str(folder))
        return train_as(place, *setting.words(folder, devices or 1), "--output-dir", str(place), env=env)

    return lambda setting, devices: of(setting.name, devices)


def often(setting: Setting, devices: int) -> list[pytest.MarkDecorator]:
    return [] if setting.name in OFTEN and devices == DEVICES else [pytest.mark.slow]


def cases() -> list[Any]:
    return [
        pytest.param(
            *(setting, devices),
            id=f"{setting.name}, {devices}",
            # One worker takes all of a setting, so that its native run is made once.
            marks=[pytest.mark.xdist_group(setting.name), *often(setting, devices)],
        )
        for setting in settings()
        for devices in (DEVICES, 1)
    ]


@pytest.mark.parametrize(("setting", "devices"), cases())
def test_what_users_run_trains_on_xla_as_natively(found: Found, setting: Setting, devices: int) -> None:
    native, xla = found(setting, None), found(setting, devices)
    for run in (native, xla):
        trains(run)
    assert CLEAN in xla.output
    apart = [abs(ours - theirs) for ours, theirs in zip(xla.losses, native.losses, strict=True)]
    assert max(apart) < APART


def trains(run: Run, steps: int = STEPS) -> None:
    """It ends well, all its figures and weights are numbers, and the last steps' losses are below the first ones'."""
    assert run.code == 0, run.output
    losses = run.losses
    assert len(losses) == steps and all(map(math.isfinite, losses)), losses
    assert all(record["applied"] for record in run.metrics if "loss" in record)
    few = min(5, steps // 2)  # all steps have the same rows
    assert sum(losses[-few:]) < sum(losses[:few]), losses
    assert all(math.isfinite(record["eval_loss"]) for record in run.metrics if "eval_loss" in record)
    files = [*run.run.glob("model/*.safetensors"), *run.run.glob("adapter/*.safetensors")]
    assert files
    for path in files:
        assert [name for name, tensor in load_file(path).items() if not torch.isfinite(tensor).all()] == []


@pytest.mark.slow
def test_the_bare_command_trains_at_its_own_sizes(tmp_path: Path) -> None:
    words = ("--model-name", "tiny-qwen3", "--dataset-name", "synthetic-gsm8k", "--max-steps", "6")
    env = environment(devices=DEVICES, XDG_CACHE_HOME=str(tmp_path))
    run = train_as(tmp_path / "out", *words, "--output-dir", str(tmp_path / "out"), env=env, timeout=1800)
    trains(run, 6)
    assert CLEAN in run.output
