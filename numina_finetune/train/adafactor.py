"""Adafactor (Shazeer and Stern, 2018, https://arxiv.org/abs/1804.04235) without a value that the host reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from numina_finetune.train.guarded import GuardedOptimizer

ROW, COLUMN, FULL = "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq"
"""Names of the second moments: of a matrix the means of its rows and of its columns, else one for each element."""
DECAY = 0.8
"""After t updates the mean of the squares forgets as ``1 - t ** -DECAY``."""
SMALLEST = 1e-30
"""Added to every squared gradient."""
LARGEST_UPDATE = 1.0
"""Root mean square of a parameter's update before the learning rate; a larger one is scaled down to it."""


class Adafactor(GuardedOptimizer):
    """What transformers' ``Adafactor(lr=…, scale_parameter=False, relative_step=False)`` computes.

    The learning rate is the schedule's own: relative steps and the scale of the parameter would be a second schedule on
    top of it. There is no first moment; weight decay is decoupled, as AdamW's. All arithmetic is fp32, whatever the
    parameter's type, and so are the moments.

    Of a parameter ``[…, rows, columns]`` each matrix has a row and a column mean of its own; an update is scaled down
    by the whole parameter's root mean square.

    State of a parameter, which the caller fills in: ``step``, an fp32 scalar, and either `ROW` ``[…, rows]`` and
    `COLUMN` ``[…, columns]`` or `FULL`, of the parameter's shape.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, stacks: Iterable[torch.nn.Parameter] = (), **options: Any
    ) -> None:
        """
        Args:
            stacks: parameters whose first dimension counts parameters of their own, such as the layers of a scan.
            options: see `GuardedOptimizer`.
        """
        super().__init__(groups, **options)
        self._stacks = frozenset(id(parameter) for parameter in stacks)

    def _moved(
        self,
        parameter: torch.nn.Parameter,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        step: torch.Tensor,
        group: dict[str, Any],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        state, newest, squares = self.state[parameter], step**-DECAY, gradient.square() + SMALLEST
        if ROW in state:
            row = _towards(state[ROW], _mean(squares, -1), newest)
            column = _towards(state[COLUMN], _mean(squares, -2), newest)
            moments = {ROW: row, COLUMN: column}
            # Two factors one after the other: of rows and columns without a gradient yet their product would overflow.
            by_row = (row / _mean(row, -1).unsqueeze(-1)).rsqrt()
            update = gradient * by_row.unsqueeze(-1) * column.rsqrt().unsqueeze(-2)
        else:
            moments = {FULL: _towards(state[FULL], squares, newest)}
            update = gradient * moments[FULL].rsqrt()
        stack = 1 if id(parameter) in self._stacks else 0
        size = _mean(update.square(), *range(stack, update.ndim)).sqrt() / LARGEST_UPDATE
        update = update / size.clamp(min=1.0).reshape(*size.shape, *[1] * (update.ndim - stack))
        return weight - update * group["lr"], moments


def _towards(mean: torch.Tensor, value: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    return mean + (value - mean) * share


def _mean(tensor: torch.Tensor, *dims: int) -> torch.Tensor:
    """Mean over ``dims``. By way of the sum, which unevenly sharded tensors get right as well."""
    count = 1
    for dim in dims:
        count *= tensor.shape[dim]
    return tensor.sum(dims) / count if dims else tensor
