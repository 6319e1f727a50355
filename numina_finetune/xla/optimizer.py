"""AdamW whose every value lives on the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch_xla
from torch import nn

from numina_finetune.config import RunConfig
from numina_finetune.train.optim import adamw_arguments, parameter_groups


def make_adamw(parameters: Mapping[str, nn.Parameter], config: RunConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW with its state already there, at step 0 and split like the parameters.

    State that only appeared in the first step would change the graph between the first and the second, and a
    checkpoint could not be loaded in place.
    """
    optimizer = torch.optim.AdamW(
        parameter_groups(parameters, config.weight_decay),
        lr=torch.zeros((), device=device),
        capturable=True,
        foreach=False,
        **adamw_arguments(config),
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": _zeros_split_like(parameter),
                "exp_avg_sq": _zeros_split_like(parameter),
            }
    return optimizer


def guarded_update(optimizer: torch.optim.AdamW, learning_rate: torch.Tensor, applied: torch.Tensor) -> None:
    """One AdamW step, undone on the device where ``applied`` (bool scalar) is false."""
    tensors = []
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        for parameter in group["params"]:
            tensors += [parameter, *optimizer.state[parameter].values()]
    with torch.no_grad():
        before = [tensor.detach().clone() for tensor in tensors]
        optimizer.step()
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(torch.where(applied, tensor, old))


def _zeros_split_like(parameter: nn.Parameter) -> torch.Tensor:
    zeros = torch.zeros_like(parameter, requires_grad=False)
    sharding = torch_xla._XLAC._get_xla_op_sharding(parameter)
    if sharding is not None:
        torch_xla._XLAC._xla_mark_sharding(zeros, sharding)
    return zeros
