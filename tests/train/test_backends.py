"""What both backends owe the loop, tried on the live model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from numina_finetune.models.generation import READ_EVERY
from tests.conftest import environment
from tests.programs import run_in_processes, run_module, told

EXACT = "precision=fp32"
"""Where what is computed in two ways has to be the same to within fp32's rounding."""
DEVICES = [pytest.param(None, id="native"), pytest.param(4, id="xla-4-devices")]


def live(task: str, folder: Path, devices: int | None, *options: str, **env: str) -> dict[str, Any]:
    result = run_module("tests.train.live", task, str(folder), *options, env=environment(devices=devices, **env))
    assert result.returncode == 0, result.stderr[-3000:]
    (found,) = told(folder)
    return dict(found)


def live_in_two_processes(task: str, folder: Path) -> list[dict[str, Any]]:
    """What each process says."""
    run_in_processes(2, "tests.train.live", task, str(folder), env=environment())
    return told(folder, 2)


@pytest.mark.parametrize("devices", DEVICES)
def test_the_exported_model_gives_the_trained_models_logits(tmp_path: Path, devices: int | None) -> None:
    result = live("export", tmp_path, devices, EXACT)
    assert result["trained"]
    assert result["largest_difference"] < 1e-5 * max(1.0, result["scale"])


def test_a_bf16_run_keeps_fp32_masters_and_exports_what_it_computed_with(tmp_path: Path) -> None:
    result = live("export", tmp_path, 4)
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
def test_an_evaluation_is_read_once_and_nothing_of_accelerates_settings_leaks_in(
    tmp_path: Path, devices: int | None
) -> None:
    """Settings that the command line refuses, where they come to the backend all the same."""
    leaks = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    leaks |= {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_MEGATRON_LM": "true"}
    found = live("evaluation", tmp_path, devices, **leaks)
    assert found["whole"] == pytest.approx(found["single"], rel=1e-6)
    assert found["whole"][1] == found["labels"]
    assert found["none"] == [0.0, 0]
    assert found["reads"] <= 2, "the losses and the counts of all batches"
    assert not found["compiled"] and found["accumulation"] == 1 and found["plugins"] == [None, None]


@pytest.mark.parametrize("devices", DEVICES)
def test_micro_batches_weigh_by_their_supervised_tokens(tmp_path: Path, devices: int | None) -> None:
    result = live("uneven", tmp_path, devices, EXACT)
    assert result["cut"] == pytest.approx(result["whole"], rel=1e-5)


@pytest.fixture(scope="module", params=DEVICES)
def generation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[bool, dict[str, Any]]:
    return request.param is not None, live("generation", tmp_path_factory.mktemp("generation"), request.param)


def test_training_goes_on_after_a_generation_as_if_there_had_been_none(generation: tuple[bool, dict[str, Any]]) -> None:
    compiled, result = generation
    assert result["digests"][0] == result["digests"][1]
    if compiled:
        # Two models of the same shapes one after the other, greedy and drawn tokens.
        assert "training-graph compilations: 1; host reads between log lines: 0" in result["summary"]
        assert "compilations for generation: 4" in result["summary"]


def test_a_model_without_an_optimizer_generates_and_rows_end_where_they_should(
    generation: tuple[bool, dict[str, Any]],
) -> None:
    _, result = generation
    assert result["drawn"][1] != result["drawn"][4], "equal prompts are drawn for apart"
    assert {len(row) for row in result["free"]} == {40}
    assert result["stopped"] == result["until stop"] != result["free"]
    assert [len(row) for row in result["ended"]] == [READ_EVERY] * 5


@pytest.mark.parametrize("generation", [None], ids=["native"], indirect=True)
def test_two_processes_share_the_prompts_and_both_get_all_tokens(
    tmp_path: Path, generation: tuple[bool, dict[str, Any]]
) -> None:
    first, second = live_in_two_processes("generation", tmp_path)
    for name in ("drawn", "free", "stopped", "ended"):
        assert first[name] == second[name]
    assert first["free"] == generation[1]["free"] and first["ended"] == generation[1]["ended"]
