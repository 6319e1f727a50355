"""A checkpoint does not show how its writer held the layers: every form of the step resumes from every other's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Run, environment, train
from tests.test_parity import EXACT

STEPS = ("--max-steps", "6", "--save-steps", "2", "--logging-steps", "1", "--global-batch-size", "4", *EXACT)
NATIVE = ("--per-device-train-batch-size", "4")


def go_back(run: Run, step: int) -> None:
    """As if the run had been killed right after ``step``."""
    for folder in run.checkpoints:
        if int(folder.parent.name.removeprefix("step-")) > step:
            (folder / "COMMITTED").unlink()


def test_scanned_unrolled_and_native_runs_resume_from_one_another(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    whole = train(folder, *STEPS, *NATIVE, env=environment())
    assert whole.code == 0, whole.output
    losses = whole.losses
    for step, options, devices in (
        (2, ("--mesh", "fsdp=2,tensor=2"), 4),  # native to scanned
        (4, ("--no-scan-layers",), 2),  # scanned to unrolled, on another mesh
        (4, (*NATIVE, "--remat", "dots"), None),  # scanned to native
    ):
        go_back(whole, step)
        resumed = train(folder, *STEPS, *options, env=environment(devices=devices))
        assert resumed.code == 0, resumed.output
        assert f"resumed from the checkpoint of step {step}/6" in resumed.output
        assert resumed.losses == pytest.approx(losses, rel=1e-4)


def test_a_checkpoint_of_a_model_with_fewer_layers_is_refused(tmp_path: Path) -> None:
    from numina_finetune.checkpoint.layout import Piece, Stored
    from numina_finetune.xla.stacking import Stacking

    pieces = [Stored(Piece(f"model.layers.{n}.w", "float32", (4, 2), (2, 0), (2, 2)), "f", 16 * n) for n in range(3)]
    held = Stacking(period=1, turns=4).restack(pieces)
    assert {one.piece.shape for one in held} == {(3, 4, 2)}, "not the model's (4, 4, 2), which is what refuses it"
