"""From a model on the CPU to parameters sharded over the mesh."""

from __future__ import annotations

from typing import Any

import torch
import torch_xla.distributed.spmd as xs
from torch import nn
from torch_xla.distributed.spmd.xla_sharding import MarkShardingFunction
from transformers import PreTrainedModel

from numina_finetune.config import BATCH_AXES
from numina_finetune.mesh import MeshShape
from numina_finetune.models.precision import canonical_name
from numina_finetune.xla.sharding import partition_of


def shard_parameters(
    model: PreTrainedModel, mesh: xs.Mesh, shape: MeshShape, device: torch.device
) -> dict[str, nn.Parameter]:
    """Move each parameter to the devices and split it at once, so that no device ever holds the whole model.

    Returns:
        The new parameters by Hugging Face name; a tied parameter stands once, under its first name.
    """
    placed: dict[nn.Parameter, nn.Parameter] = {}
    named: dict[str, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        if parameter not in placed:
            moved = nn.Parameter(parameter.detach().to(device), requires_grad=parameter.requires_grad)
            known_as = canonical_name(name)
            xs.mark_sharding(moved, mesh, partition_of(model.config.model_type, known_as, tuple(moved.shape), shape))
            placed[parameter] = named[known_as] = moved
        # Module.to() would break ties: an XLA tensor cannot be swapped into a CPU parameter in place.
        setattr(model.get_submodule(owner), leaf, placed[parameter])
    for name, buffer in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer.to(device))
    return named


def constrain_activations(model: PreTrainedModel, mesh: xs.Mesh) -> None:
    """Keep hidden states split by rows after the embedding and every layer, forward and backward.

    Without it the partitioner may follow a weight's split instead, and exchange activations rather than weights.
    """
    spec = (BATCH_AXES, None, None)

    def split_rows(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        marked: torch.Tensor = MarkShardingFunction.apply(output, mesh, spec)
        return marked

    decoder = model.base_model
    for module in (decoder.embed_tokens, *decoder.layers):
        module.register_forward_hook(split_rows)
