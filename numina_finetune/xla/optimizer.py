"""The optimizer, every value of which lives on the mesh."""

from __future__ import annotations

import torch

from numina_finetune.config import RunConfig
from numina_finetune.train import optim
from numina_finetune.xla.placement import Placed, Tensors
from numina_finetune.xla.rounding import StochasticRounding
from numina_finetune.xla.sharding import PartitionSpec


def make_optimizer(placed: Placed, config: RunConfig, tensors: Tensors, platform: str) -> optim.Optimizer:
    """See :func:`numina_finetune.train.optim.make_optimizer`; the state is split like the parameters.

    Args:
        platform: of the devices, ``tpu`` or ``cpu``.
    """

    def zeros(name: str, dims: tuple[int, ...]) -> torch.Tensor:
        shape, spec = placed.parameters[name].shape, placed.specs[name]
        return tensors.zeros(tuple(shape[dim] for dim in dims), torch.float32, tuple(spec[dim] for dim in dims))

    stacking = placed.stacking
    return optim.make_optimizer(
        placed.parameters,
        config,
        zeros=zeros,
        matrices=placed.decayed,
        stacks=[name for name in placed.parameters if stacking and len(stacking.members(name)) > 1],
        rounding=StochasticRounding(platform),
    )


def state_spec(placed: Placed, name: str, key: str) -> PartitionSpec:
    """Partition of the tensor ``key`` of the optimizer's state for a parameter."""
    spec = placed.specs[name]
    return tuple(spec[dim] for dim in optim.kept_dims(key, len(spec)))
