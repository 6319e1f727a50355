"""Steps whose loss or gradient norm stands far above those before them."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median

WINDOW = 50
"""Steps that say what is usual."""
FEWEST = 20
"""Steps before anything can be unusual."""
_SPREAD = {"loss": 0.02, "gradient norm": 0.1}
"""Least standard deviation of the logarithm: a curve may be so smooth that its own says nothing."""
_OF_NORMAL = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""


@dataclass(frozen=True)
class Spike:
    """What stood out."""

    loss: float
    usual_loss: float
    """Median of the steps before."""
    grad_norm: float
    usual_grad_norm: float
    above: tuple[str, ...]
    """Which of the two: ``loss``, ``gradient norm``."""


class SpikeWatch:
    """Compares each step with the median of those before it, by their median absolute deviation.

    Both are of logarithms: losses and norms vary by shares of themselves. They do not move with a spike, as mean and
    standard deviation would, but follow a lasting change within half a window.
    """

    def __init__(self, factor: float) -> None:
        """
        Args:
            factor: standard deviations above the median from which on a step stands out; 0 = none does.
        """
        self._factor = factor
        self._past = {what: deque[float](maxlen=WINDOW) for what in _SPREAD}

    def look(self, loss: float, grad_norm: float) -> Spike | None:
        """Take in the next step, and say whether it stands out; one that is not finite, or zero, is passed over."""
        found = {"loss": loss, "gradient norm": grad_norm}
        if not all(0 < value < math.inf for value in found.values()):
            return None
        above = tuple(what for what, value in found.items() if self._is_above(what, math.log(value)))
        usual = {what: math.exp(median(past)) if past else math.nan for what, past in self._past.items()}
        for what, value in found.items():
            self._past[what].append(math.log(value))
        return Spike(loss, usual["loss"], grad_norm, usual["gradient norm"], above) if above else None

    def _is_above(self, what: str, value: float) -> bool:
        past = self._past[what]
        if not self._factor or len(past) < FEWEST:
            return False
        middle = median(past)
        spread = _OF_NORMAL * median(abs(one - middle) for one in past)
        return value > middle + self._factor * max(spread, _SPREAD[what])
