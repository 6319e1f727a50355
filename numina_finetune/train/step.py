"""The arithmetic of one optimizer step, the same on every backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch.distributed.tensor import DTensor

from numina_finetune.data.loader import NO_LOSS
from numina_finetune.train.backend import DeviceBatch, DeviceMetrics
from numina_finetune.train.noise import signal_and_noise
from numina_finetune.train.optim import Optimizer, guarded_update


def optimizer_step(
    backward: Callable[[torch.Tensor], torch.Tensor],
    parameters: Sequence[torch.nn.Parameter],
    batches: Sequence[DeviceBatch],
    optimizer: Optimizer,
    learning_rate: float | torch.Tensor,
    *,
    max_grad_norm: float,
    reduce: Callable[[torch.Tensor], torch.Tensor],
    gradient_scale: float,
    foreach: bool | None,
    gradient_noise: bool,
) -> DeviceMetrics:
    """Forward, backward and update over the micro-batches of one optimizer step.

    The loss is the mean over the supervised tokens of the whole step: micro-batches and devices with more of them
    weigh more, as if it had all been one batch.

    Args:
        backward: takes the gradients of the batches' summed loss, times its argument (a scalar), into the parameters'
            ``grad``, and gives that sum.
        optimizer: of the parameters that are trained.
        learning_rate: a number, or an fp32 scalar on the device.
        max_grad_norm: 0 = no clipping.
        reduce: sum over processes; the identity where one program spans all devices.
        gradient_scale: undoes the averaging of gradients over processes.
        foreach: fused gradient norm; False where the device library cannot.
        gradient_noise: measure it; the optimizer is an AdamW then.

    Returns:
        See :data:`~numina_finetune.train.backend.DeviceMetrics`.
    """
    supervised = reduce(_count(batch["labels"] != NO_LOSS for batch in batches))
    tokens = reduce(_count(batch["segment_ids"] > 0 for batch in batches))
    # A step of empty rows has no supervised token; its gradients are then zero, not 0/0.
    divisor = torch.clamp(supervised, min=1.0)
    loss = reduce(backward(gradient_scale / divisor)) / divisor

    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = total_norm(gradients, foreach)
    applied = torch.isfinite(norm) & torch.isfinite(loss)
    if max_grad_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm, foreach=foreach)
    guarded_update(optimizer, learning_rate, applied)
    weight_norm = total_norm([p.detach() for p in parameters if p.requires_grad], foreach)
    for parameter in parameters:
        parameter.grad = None
    if gradient_noise:
        clipped = norm if max_grad_norm == 0 else torch.clamp(norm, max=max_grad_norm)
        parts = signal_and_noise(optimizer, clipped, partial(total_norm, foreach=foreach))
    else:
        parts = loss.new_full((2,), torch.nan)
    return torch.cat(
        [torch.stack([loss, norm.float(), supervised, tokens, applied.float(), weight_norm.float()]), parts]
    )


def total_norm(tensors: list[torch.Tensor], foreach: bool | None) -> torch.Tensor:
    """The norm of all of them as one vector, a scalar; of sharded ones (DTensors) over all processes."""
    norm = torch.nn.utils.get_total_norm(tensors, foreach=foreach)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _count(masks: Iterable[torch.Tensor]) -> torch.Tensor:
    """True values in all of ``masks``, as an fp32 scalar on the device."""
    return torch.stack([mask.sum() for mask in masks]).sum().float()
