"""The gradient noise scale: how many rows a step could take before more of them would hardly make it better.

McCandlish et al., 2018 (https://arxiv.org/abs/1812.06162) call ``B_simple = tr(S) / |G|²`` the simple noise scale: G is
the true gradient, S the covariance of one example's. Their estimate compares gradients of two batch sizes. AdamW has a
second one anyway: its first moment ``m`` is a mean of past gradients, and with ``N = tr(S) / batch``, the noise of one
step's gradient,

    E|g|² = |G|² + N        E|m|² = |G|² + share · N

where ``share`` is the sum of the squared weights of the mean, (1 - β) / (1 + β) after many steps. Both are solved for
|G|² and N, whose means over many steps give the scale. So it needs no micro-batches, and no pass over gradients. That
the true gradient turns between the steps of a mean counts as noise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

WINDOW = 100
"""Optimizer steps over which both parts are averaged: |G|² alone may come out negative in a single one."""
FEWEST = 20
"""Steps before the scale is told."""

NormOf = Callable[[list[torch.Tensor]], torch.Tensor]
"""Global norm of some tensors, an fp32 scalar."""


def signal_and_noise(optimizer: torch.optim.Optimizer, gradient_norm: torch.Tensor, norm_of: NormOf) -> torch.Tensor:
    """|G|² and N as the last step alone shows them: fp32 ``[2]`` on the device, NaN after the first one.

    Args:
        optimizer: an AdamW that has just made its step.
        gradient_norm: of what it was given, after clipping.
    """
    beta: float = optimizer.param_groups[0]["betas"][0]
    states = [optimizer.state[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    step = states[0]["step"]
    left = beta**step  # of the first moment's zeros
    share = (1 - beta) / (1 + beta) * (1 + left) / (1 - left)
    moment = (norm_of([state["exp_avg"] for state in states]).float() / (1 - left)).square()
    gradient = gradient_norm.float().square()
    parts = torch.stack([moment - share * gradient, gradient - moment]) / (1 - share)
    return torch.where(step > 1, parts, torch.nan)


class NoiseScale:
    """The scale over the newest steps, in batches: times the rows of a batch, it is in rows."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def add(self, signal: float, noise: float) -> None:
        """One step's |G|² and N."""
        self._steps.append((signal, noise))

    @property
    def batches(self) -> float | None:
        """None while there are too few steps, or where the noise hides the gradient in all of them."""
        signal, noise = (sum(values) for values in zip(*self._steps, strict=True)) if self._steps else (0.0, 0.0)
        if len(self._steps) < FEWEST or signal <= 0:
            return None
        return max(noise, 0.0) / signal
