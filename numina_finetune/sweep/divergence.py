"""When a trial has failed for good, and need not be run to its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from numina_finetune.train.metrics import Record

WINDOW = 10
"""Steps over which the loss is averaged."""
MARGIN = 0.5
"""Nats that the averaged loss must be above its best besides: small losses double by chance."""
NONFINITE_STEPS = 3
"""Skipped steps in a row; the training itself gives up after ten."""


@dataclass(frozen=True)
class Criteria:
    """Diverging = the averaged loss stays above ``factor`` times its best, and `MARGIN` above it, for ``steps`` steps.

    Three skipped steps in a row (non-finite loss or gradient) are diverging in any case.
    """

    factor: float = 2.0
    """0 = only non-finite steps count."""
    steps: int = 20


@dataclass(frozen=True)
class Divergence:
    """At which step a trial was given up, and why."""

    step: int
    reason: str


def divergence(records: Sequence[Record], criteria: Criteria) -> Divergence | None:
    """The first step at which the training was diverging, from the records of its steps in their order."""
    losses = np.array([float(record["loss"]) for record in records])
    skipped = ~np.isfinite(losses) | np.array([record.get("applied") is False for record in records], dtype=bool)
    found = []
    if (place := _first_run(skipped, NONFINITE_STEPS)) is not None:
        found.append((place, f"{NONFINITE_STEPS} steps in a row had a non-finite loss or gradient"))
    averaged = _averaged(losses)
    best = np.fmin.accumulate(averaged) if len(averaged) else averaged
    above = (averaged > criteria.factor * best) & (averaged > best + MARGIN)
    if criteria.factor and (place := _first_run(above, criteria.steps)) is not None:
        found.append(
            (
                place,
                f"the loss, averaged over {WINDOW} steps, stayed above {criteria.factor:g} times its best "
                f"({best[place]:.3f}) for {criteria.steps} steps, and is {averaged[place]:.3f}",
            )
        )
    if not found:
        return None
    place, reason = min(found)
    return Divergence(int(records[place]["step"]), reason)


def _averaged(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of the finite ones among the last `WINDOW`; the first one stands for the start. ``[steps] -> [steps]``."""
    finite = np.isfinite(losses)
    sums, counts = (np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(finite, losses, 0.0), finite))
    ends = np.arange(1, len(losses) + 1)
    begins = np.maximum(ends - WINDOW, 0)
    number = counts[ends] - counts[begins]
    return np.where(number > 0, (sums[ends] - sums[begins]) / np.maximum(number, 1), np.nan)


def _first_run(flags: NDArray[np.bool_], length: int) -> int | None:
    """The place at which the first ``length`` true values in a row are complete."""
    run = 0
    for place, flag in enumerate(flags):
        run = run + 1 if flag else 0
        if run == length:
            return place
    return None
