"""One compiled program does all steps, and between log lines nothing leaves the device: as the recipes have them, see
``tests/recipes``; here in other forms."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import environment, train

CLEAN = "training-graph compilations: 1; host reads between log lines: 0; operators outside XLA: 0"


@pytest.mark.parametrize(
    ("capacity", "least", "most"),
    [
        (0.5, 0.3, 0.8),
        pytest.param(None, 0.0, 0.3, marks=pytest.mark.slow),
        pytest.param(8.0, 0.0, 0.0, marks=pytest.mark.slow),
    ],
)
def test_dropped_tokens_are_counted_in_the_one_program(
    tmp_path: Path, capacity: float | None, least: float, most: float
) -> None:
    """Half of what balanced routing sends: about half is dropped, and said so; with room for all, nothing is."""
    options = ("--model-name", "tiny-gpt-oss", "--experts", "capacity", "--mesh", "fsdp=2,expert=2")
    steps = ("--max-steps", "3", "--logging-steps", "1", "--save-steps", "0", "--global-batch-size", "4")
    if capacity is not None:
        options = (*options, "--expert-capacity", str(capacity))
    run = train(tmp_path / "out", *options, *steps, env=environment(devices=4))
    assert run.code == 0, run.output
    assert CLEAN in run.output
    shares = [record["dropped_share"] for record in run.metrics if "loss" in record]
    assert len(shares) == 3
    assert all(least <= share <= most for share in shares)


@pytest.mark.parametrize(
    "options",
    [
        ("--remat", "dots", "--mesh", "data=2,tensor=2"),
        pytest.param(("--remat", "none", "--loss-chunks", "vocabulary"), marks=pytest.mark.slow),
        pytest.param(("--no-scan-layers", "--remat", "none"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_every_form_of_the_step_is_one_program(tmp_path: Path, options: tuple[str, ...]) -> None:
    steps = ("--max-steps", "4", "--logging-steps", "4", "--save-steps", "0", "--global-batch-size", "4")
    run = train(tmp_path / "out", *steps, *options, env=environment(devices=4))
    assert run.code == 0, run.output
    assert CLEAN in run.output
