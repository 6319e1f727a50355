"""What this package's own optimizers share: fp32 arithmetic that the host reads nothing of, and updates that a device
can leave out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch

from numina_finetune.train.rounding import round_stochastically

Rounding = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""``(fp32 value of a parameter, step, salt)`` to the value in bf16. The step is an fp32 scalar on the device; the salt
is another number for each parameter."""


class GuardedOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer with decoupled weight decay, whose state exists, in fp32, before the first step.

    Where `found_inf` is 1, a step changes nothing, its own count included: the contract of torch's fused AdamW, so that
    a training step has one way to leave out an update on every backend.
    """

    grad_scale: torch.Tensor | None = None
    """Part of the same contract; this package scales the loss instead."""
    found_inf: torch.Tensor | None = None
    """fp32 scalar on the device, 0 or 1; None = 0."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        seed: int = 0,
        rounding: Rounding = round_stochastically,
        **defaults: Any,
    ) -> None:
        """
        Args:
            groups: with ``weight_decay``, and ``lr`` (a number, or an fp32 scalar on the device) before each step.
            seed: what the rounding depends on, besides step, parameter and element.
            rounding: of the new values of bf16 parameters.
        """
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, **defaults})
        self._seed, self._rounding = seed, rounding

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad.float(), group, number)

    @abstractmethod
    def _moved(
        self,
        parameter: torch.nn.Parameter,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        step: torch.Tensor,
        group: dict[str, Any],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The new weight and the new moments, which are not written yet.

        Args:
            weight, gradient: of the parameter's shape, fp32; the weight has decayed.
            step: fp32 scalar, 1 in the first step.
        """

    def _update(
        self, parameter: torch.nn.Parameter, gradient: torch.Tensor, group: dict[str, Any], number: int
    ) -> None:
        state = self.state[parameter]
        step = state["step"] + 1
        decayed = parameter.float() * (1 - group["lr"] * group["weight_decay"])
        weight, moments = self._moved(parameter, decayed, gradient, step, group)
        if parameter.dtype == torch.bfloat16:
            weight = self._rounding(weight, step, self._seed * 1_000_003 + number)
        self._set(parameter, weight)
        for name, value in {"step": step, **moments}.items():
            self._set(state[name], value)

    def _set(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        tensor.copy_(value if self.found_inf is None else torch.where(self.found_inf > 0, tensor, value))
