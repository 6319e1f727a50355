"""One compiled program does all steps, and between log lines nothing leaves the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, environment, train

RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
CLEAN = "training-graph compilations: 1; host reads between log lines: 0; operators outside XLA: 0"


def as_tests(recipes: list[Path]) -> list[Any]:
    """One for each architecture is enough where time is short."""
    often = [path for path in recipes if path.stem in ("gsm8k_qwen3_0.6b", "numina_tir_gpt_oss_120b")]
    return [*often, *(pytest.param(path, marks=pytest.mark.slow) for path in recipes if path not in often)]


@pytest.mark.parametrize("recipe", as_tests(RECIPES), ids=lambda path: path.stem)
def test_a_recipes_steps_are_one_program(tmp_path: Path, recipe: Path) -> None:
    """With the recipe's own options, on a model, data and a batch that a test can take."""
    theirs = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    smaller = ()
    if "gpt-oss" in theirs["model_name"]:
        smaller = ("--model-name", "tiny-gpt-oss", "--mesh", "fsdp=2,expert=2")
    evaluation = (
        ("--eval-dataset-name", "synthetic-gsm8k[test]")
        if "eval_dataset_name" in theirs
        else ("--validation-size", "8")
    )
    run = train(
        tmp_path / "out",
        *("--config", str(recipe), "--precision", theirs["precision"], *evaluation, *smaller),
        *("--global-batch-size", "8", "--max-steps", "5", "--eval-steps", "3", "--logging-steps", "2"),
        env=environment(devices=4),
    )
    assert run.code == 0, run.output
    assert CLEAN in run.output
    assert len([record for record in run.metrics if "eval_loss" in record]) == 2


@pytest.mark.parametrize(
    ("capacity", "least", "most"), [(0.5, 0.3, 0.8), pytest.param(8.0, 0.0, 0.0, marks=pytest.mark.slow)]
)
def test_dropped_tokens_are_counted_in_the_one_program(
    tmp_path: Path, capacity: float, least: float, most: float
) -> None:
    """Half of what balanced routing sends: about half is dropped, and said so; with room for all, nothing is."""
    options = ("--model-name", "tiny-gpt-oss", "--experts", "capacity", "--mesh", "fsdp=2,expert=2")
    steps = ("--max-steps", "3", "--logging-steps", "1", "--save-steps", "0", "--global-batch-size", "4")
    run = train(tmp_path / "out", *options, "--expert-capacity", str(capacity), *steps, env=environment(devices=4))
    assert run.code == 0, run.output
    assert CLEAN in run.output
    shares = [record["dropped_share"] for record in run.metrics if "loss" in record]
    assert len(shares) == 3
    assert all(least <= share <= most for share in shares)


@pytest.mark.parametrize(
    "options",
    [
        ("--remat", "dots", "--mesh", "data=2,tensor=2", "--precision", "bf16"),
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
