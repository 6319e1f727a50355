"""The optimizer step as XLA traces it: the same function for training and for planning."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from numina_finetune.train.backend import DeviceBatch, DeviceMetrics
from numina_finetune.train.step import optimizer_step
from numina_finetune.xla.optimizer import guarded_update
from numina_finetune.xla.placement import Placed
from numina_finetune.xla.tally import counting


def train_step(
    placed: Placed,
    optimizer: torch.optim.AdamW,
    batches: Sequence[DeviceBatch],
    learning_rate: torch.Tensor,
    *,
    max_grad_norm: float,
) -> DeviceMetrics:
    """Forward, backward and update, traced and not run.

    Every tensor may be one without a value. ``placed.parameters`` and the optimizer's state hold the new values
    afterwards.

    Args:
        optimizer: of :func:`numina_finetune.xla.optimizer.make_adamw`.
        batches: one for each micro-batch, int32 ``[batch, seq]`` tensors over all devices.
        learning_rate: fp32 scalar.
    """
    module = _Counted(placed)
    metrics = optimizer_step(
        module,
        list(placed.parameters.values()),
        batches,
        max_grad_norm=max_grad_norm,
        update=lambda applied: guarded_update(optimizer, learning_rate, applied),
        reduce=lambda value: value,
        gradient_scale=1.0,
        accumulating=nullcontext,
        foreach=False,
    )
    return torch.cat([metrics, *module.dropped_share()])


class _Counted:
    """The module, and what its layers count: dropped and all assignments of tokens to experts."""

    def __init__(self, placed: Placed) -> None:
        self._module = placed.module
        self._found: list[torch.Tensor] = []

    def __call__(self, **batch: torch.Tensor) -> torch.Tensor:
        # Not around the backward pass as well: what is computed again there would be counted again.
        with counting() as found:
            loss: torch.Tensor = self._module(**batch)
        self._found += found
        return loss

    def dropped_share(self) -> list[torch.Tensor]:
        """``[1]``; nothing where no assignment can be dropped."""
        if not self._found:
            return []
        dropped, everything = torch.stack(self._found).sum(0)
        return [(dropped / everything).reshape(1)]
