"""AdamW whose every value lives on the device."""

from __future__ import annotations

import torch

from numina_finetune.config import RunConfig
from numina_finetune.train.optim import adamw_arguments, parameter_groups
from numina_finetune.xla.placement import Placed, Tensors


def make_adamw(placed: Placed, config: RunConfig, tensors: Tensors) -> torch.optim.AdamW:
    """AdamW with its state already there, at step 0 and split like the parameters.

    State that only appeared in the first step would change the graph between the first and the second, and a
    checkpoint could not be loaded in place.
    """
    optimizer = torch.optim.AdamW(
        parameter_groups(placed.parameters, config.weight_decay, placed.decayed),
        lr=0.0,  # each step brings its own; torch reads the value of a tensor given here
        capturable=True,
        foreach=False,
        **adamw_arguments(config),
    )
    for name, parameter in placed.parameters.items():
        if not parameter.requires_grad:
            continue
        shape, spec = tuple(parameter.shape), placed.specs[name]
        optimizer.state[parameter] = {
            "step": tensors.zeros((), torch.float32, ()),
            "exp_avg": tensors.zeros(shape, parameter.dtype, spec),
            "exp_avg_sq": tensors.zeros(shape, parameter.dtype, spec),
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
