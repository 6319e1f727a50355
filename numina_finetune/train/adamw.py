"""AdamW (Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101) without a value that the host reads."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from numina_finetune.train.guarded import GuardedOptimizer


class AdamW(GuardedOptimizer):
    """What ``torch.optim.AdamW`` computes, at any rate, 0 included.

    torch's own form for rates that the host does not know (``capturable``) divides by the rate: at rate 0 it makes NaN
    of every weight whose second moment is 0.

    State of a parameter, which the caller fills in: ``step``, an fp32 scalar, and ``exp_avg`` and ``exp_avg_sq``, fp32
    and of the parameter's shape.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float], eps: float, **options: Any
    ) -> None:
        """
        Args:
            betas: how much of the first and of the second moment a step keeps.
            options: see `GuardedOptimizer`.
        """
        super().__init__(groups, betas=betas, eps=eps, **options)

    def _moved(
        self,
        parameter: torch.nn.Parameter,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        step: torch.Tensor,
        group: dict[str, Any],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        first = state["exp_avg"] + (gradient - state["exp_avg"]) * (1 - beta1)
        second = state["exp_avg_sq"] * beta2 + gradient * (1 - beta2) * gradient
        size = second.sqrt() / _grown(beta2, step).sqrt() + group["eps"]
        rate = group["lr"] / _grown(beta1, step)
        return weight - first * rate / size, {"exp_avg": first, "exp_avg_sq": second}


def _grown(beta: float, step: torch.Tensor) -> torch.Tensor:
    """``1 - beta ** step``, the share of a moment that is not its zeros at the start.

    By way of expm1, since in fp32 the power is known to a hundred-thousandth of the difference only.
    """
    return torch.ones_like(step) if beta == 0 else -torch.expm1(step * math.log(beta))
