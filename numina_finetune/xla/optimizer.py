"""The optimizer, every value of which lives on the mesh."""

from __future__ import annotations

import torch

from numina_finetune.config import RunConfig
from numina_finetune.train import optim
from numina_finetune.xla.placement import Placed, Tensors
from numina_finetune.xla.sharding import PartitionSpec


def make_optimizer(placed: Placed, config: RunConfig, tensors: Tensors) -> torch.optim.Optimizer:
    """See :func:`numina_finetune.train.optim.make_optimizer`; the state is split like the parameters."""

    def zeros(name: str, dims: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        shape, spec = placed.parameters[name].shape, placed.specs[name]
        return tensors.zeros(tuple(shape[dim] for dim in dims), dtype, tuple(spec[dim] for dim in dims))

    stacking = placed.stacking
    return optim.make_optimizer(
        placed.parameters,
        config,
        zeros=zeros,
        matrices=placed.decayed,
        stacks=[name for name in placed.parameters if stacking and len(stacking.members(name)) > 1],
        capturable=True,  # torch reads the value of a rate that is a tensor otherwise
        foreach=False,
    )


def state_spec(placed: Placed, name: str, key: str) -> PartitionSpec:
    """Partition of the tensor ``key`` of the optimizer's state for a parameter."""
    spec = placed.specs[name]
    return tuple(spec[dim] for dim in optim.kept_dims(key, len(spec)))


def guarded_update(optimizer: torch.optim.Optimizer, learning_rate: torch.Tensor, applied: torch.Tensor) -> None:
    """One step of the optimizer, undone on the device where ``applied`` (bool scalar) is false."""
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
