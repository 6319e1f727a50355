"""The best checkpoint is the most accurate one, or where no accuracy was measured, that of the lowest loss."""

from __future__ import annotations

import math

import pytest

from numina_finetune.checkpoint.evaluations import Evaluation, best_of, from_manifest, to_manifest

PLACES = [(30, 1), (20, 1), (10, 1)]


@pytest.mark.parametrize(
    ("evaluations", "best"),
    [
        ({10: Evaluation(2.0), 20: Evaluation(1.0), 30: Evaluation(1.5)}, [(20, 1)]),
        ({10: Evaluation(1.0), 20: Evaluation(1.0)}, [(10, 1)]),
        ({10: Evaluation(2.0, 0.9), 20: Evaluation(1.0, 0.8)}, [(10, 1)]),
        ({10: Evaluation(2.0, 0.0), 20: Evaluation(1.0, 0.0), 30: Evaluation(1.5, 0.0)}, [(20, 1)]),
        ({10: Evaluation(0.5), 20: Evaluation(1.0, 0.1)}, [(20, 1)]),
        ({10: Evaluation(None, 0.2), 20: Evaluation(None, 0.1)}, [(10, 1)]),
        ({10: Evaluation(math.nan), 40: Evaluation(0.1)}, []),
        ({10: Evaluation(math.nan, 0.1)}, [(10, 1)]),
    ],
)
def test_the_best_of_committed_checkpoints(evaluations: dict[int, Evaluation], best: list[tuple[int, int]]) -> None:
    assert best_of(PLACES, evaluations) == best


def test_a_manifest_tells_them_and_older_ones_that_know_losses_only_are_read() -> None:
    evaluations = {10: Evaluation(2.0, 0.5), 20: Evaluation(1.0), 30: Evaluation(None, 0.25)}
    assert from_manifest(to_manifest(evaluations)) == evaluations
    assert from_manifest({"evaluations": {"10": 2.0}}) == {10: Evaluation(2.0)}
    assert to_manifest({10: Evaluation(2.0)}) == {"evaluations": {"10": 2.0}}
