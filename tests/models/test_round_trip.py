"""A model that is loaded, placed on devices and exported is the one that it was, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import environment
from tests.models.folders import CONFIGS, quantise_randomly, save
from tests.programs import run_module
from tests.reference import gpt_oss_config


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Released in bf16, tied and not, in one file and in many; and with packed experts."""
    base = tmp_path_factory.mktemp("models")
    save(CONFIGS["qwen3"], base / "qwen3", max_shard_size="100KB")
    save(CONFIGS["qwen3, tied"], base / "tied")
    save(gpt_oss_config(8, layers=4), base / "gpt-oss")
    save(gpt_oss_config(8, layers=4), base / "mxfp4")
    quantise_randomly(base / "mxfp4")
    return {path.name: path for path in base.iterdir()}


def round_trips(devices: int | None, *cases: str) -> dict[str, dict[str, Any]]:
    result = run_module("tests.models.round_trip", *cases, env=environment(devices=devices))
    assert result.returncode == 0, result.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    return found


def assert_unchanged(found: dict[str, dict[str, Any]]) -> None:
    for case, told in found.items():
        assert told["empty"] and told["loaded"] and told["exported"], (case, told)
        model = "GptOssForCausalLM" if "gpt-oss" in case or "mxfp4" in case else "Qwen3ForCausalLM"
        assert told["opened"] == f"{model} torch.bfloat16", case
        # every tensor once, whatever number of devices holds it, and the headers
        assert told["read"] <= told["stored"], (case, told)


def test_a_model_on_four_devices_is_exported_as_it_was(folders: dict[str, Path]) -> None:
    assert_unchanged(
        round_trips(
            4,
            f"{folders['qwen3']};mesh=fsdp=2,tensor=2",
            f"{folders['tied']};mesh=data=2,fsdp=2;scan=false",
            f"{folders['gpt-oss']};mesh=expert=2,fsdp=2",
            f"{folders['mxfp4']};mesh=fsdp=2,tensor=2",
            f"{folders['mxfp4']};mesh=expert=2,fsdp=2;scan=false;precision=pure-bf16",
        )
    )


def test_a_model_on_the_native_backend_is_exported_as_it_was(folders: dict[str, Path]) -> None:
    assert_unchanged(round_trips(None, *map(str, folders.values())))
