"""The optimizer step as XLA traces it: the same function for training and for planning."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from numina_finetune.train.backend import DeviceBatch, DeviceMetrics
from numina_finetune.train.optim import Optimizer
from numina_finetune.train.step import optimizer_step
from numina_finetune.xla.loops import Tensors
from numina_finetune.xla.micro_batches import MicroBatches
from numina_finetune.xla.placement import Placed


def train_step(
    placed: Placed,
    micro_batches: MicroBatches,
    optimizer: Optimizer,
    batches: Sequence[DeviceBatch],
    learning_rate: torch.Tensor,
    *,
    max_grad_norm: float,
    gradient_noise: bool,
) -> DeviceMetrics:
    """Forward, backward and update, traced and not run.

    Every tensor may be one without a value. ``placed.parameters`` and the optimizer's state hold the new values
    afterwards.

    Args:
        micro_batches: of the same ``placed``.
        optimizer: of :func:`numina_finetune.xla.optimizer.make_optimizer`.
        batches: one for each micro-batch, int32 ``[batch, seq]`` tensors over all devices.
        learning_rate: fp32 scalar.
    """
    counted: Tensors = []

    def backward(scale: torch.Tensor) -> torch.Tensor:
        loss, counts = micro_batches.backward(batches, scale)
        counted.extend(counts)
        return loss

    metrics = optimizer_step(
        backward,
        list(placed.parameters.values()),
        batches,
        optimizer,
        learning_rate,
        max_grad_norm=max_grad_norm,
        reduce=lambda value: value,
        gradient_scale=1.0,
        foreach=False,
        gradient_noise=gradient_noise,
    )
    return torch.cat([metrics, *_dropped_share(counted)])


def _dropped_share(counted: Tensors) -> Tensors:
    """``[1]``, of all assignments of tokens to experts; nothing where none can be dropped."""
    if not counted:
        return []
    dropped, everything = torch.stack(counted).sum(0)
    return [(dropped / everything).reshape(1)]
