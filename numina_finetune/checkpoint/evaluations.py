"""What evaluations said of a run's steps, and which checkpoint that makes the best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_LOSSES, _ACCURACIES = "evaluations", "accuracies"
"""Where a manifest keeps them, by step."""


@dataclass(frozen=True)
class Evaluation:
    """Of the state after one optimizer step."""

    loss: float | None = None
    accuracy: float | None = None
    """Share of problems answered right."""

    def __str__(self) -> str:
        said = [] if self.accuracy is None else [f"accuracy {self.accuracy:.1%}"]
        said += [] if self.loss is None else [f"loss {self.loss:.4f}"]
        return ", ".join(said)


Evaluations = Mapping[int, Evaluation]
"""By step."""


def to_manifest(evaluations: Evaluations) -> dict[str, dict[str, float]]:
    """What a checkpoint's manifest says of them."""
    losses = {str(step): one.loss for step, one in evaluations.items() if one.loss is not None}
    accuracies = {str(step): one.accuracy for step, one in evaluations.items() if one.accuracy is not None}
    return {_LOSSES: losses, **({_ACCURACIES: accuracies} if accuracies else {})}


def from_manifest(manifest: Mapping[str, Any]) -> dict[int, Evaluation]:
    """The inverse of :func:`to_manifest`."""
    losses, accuracies = manifest[_LOSSES], manifest.get(_ACCURACIES, {})
    return {int(step): Evaluation(losses.get(step), accuracies.get(step)) for step in {**losses, **accuracies}}


def best_of(committed: Iterable[tuple[int, int]], evaluations: Evaluations) -> list[tuple[int, int]]:
    """The best of committed checkpoints (step, attempt), at most one.

    Where accuracies were measured, the most accurate one, of equals that of the lower loss; else the one with the
    lowest loss. The earlier one of equals.
    """
    places = [place for place in committed if place[0] in evaluations]
    measured = [place for place in places if _number(evaluations[place[0]].accuracy) is not None]
    evaluated = measured or [place for place in places if _number(evaluations[place[0]].loss) is not None]

    def rank(place: tuple[int, int]) -> tuple[float, float, tuple[int, int]]:
        one = evaluations[place[0]]
        loss = _number(one.loss)
        return -(_number(one.accuracy) or 0.0), math.inf if loss is None else loss, place

    return [min(evaluated, key=rank)] if evaluated else []


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
