"""A run with adapters on a mesh goes on from the native backend's checkpoint, as one program."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import environment, train
from tests.xla.test_checkpoints import go_back
from tests.xla.test_hygiene import CLEAN

OPTIONS = (
    *("--model-name", "tiny-gpt-oss", "--lora-rank", "4", "--lora-export", "adapter"),
    *("--max-steps", "4", "--save-steps", "2", "--logging-steps", "1", "--global-batch-size", "4"),
)


def test_adapters_on_a_mesh_follow_the_native_backend_with_one_compilation(tmp_path: Path) -> None:
    whole = train(tmp_path / "out", *OPTIONS, "--per-device-train-batch-size", "4", env=environment())
    assert whole.code == 0, whole.output
    losses = whole.losses
    for options in (("--mesh", "fsdp=2,expert=2"), ("--mesh", "fsdp=2,tensor=2", "--no-scan-layers")):
        go_back(whole, 2)
        resumed = train(tmp_path / "out", *OPTIONS, *options, env=environment(devices=4))
        assert resumed.code == 0, resumed.output
        assert "resumed from the checkpoint of step 2/4" in resumed.output
        assert CLEAN in resumed.output
        assert resumed.losses == pytest.approx(losses, rel=1e-5)
