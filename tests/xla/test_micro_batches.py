"""Micro-batches in a loop of the program: another cut of the same step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import environment, train
from tests.test_parity import EXACT
from tests.xla.test_hygiene import CLEAN

STEPS = ("--max-steps", "3", "--logging-steps", "1", "--save-steps", "0", *EXACT)


@pytest.mark.parametrize(
    "options",
    [
        ("--mesh", "fsdp=2,tensor=2"),
        pytest.param(
            ("--model-name", "tiny-gpt-oss", "--mesh", "fsdp=2,expert=2", "--lora-rank", "4", "--remat", "dots"),
            marks=pytest.mark.slow,
        ),
        pytest.param(("--no-scan-layers", "--remat", "full"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_a_step_in_four_micro_batches_is_the_step_in_one(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Loss and gradient norm of three steps; four turns of one program, which is compiled once."""
    figures = []
    for rows, count in ((4, 1), (1, 4)):
        cut = ("--per-device-train-batch-size", str(rows), "--gradient-accumulation-steps", str(count))
        run = train(tmp_path / str(count), *options, *STEPS, *cut, env=environment(devices=4))
        assert run.code == 0, run.output
        assert CLEAN in run.output
        figures.append([(record["loss"], record["grad_norm"]) for record in run.metrics if "loss" in record])
    assert len(figures[0]) == 3
    for at_once, in_turns in zip(*figures, strict=True):
        assert in_turns == pytest.approx(at_once, rel=1e-5)
