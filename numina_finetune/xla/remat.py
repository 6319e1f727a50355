"""Gradient checkpointing on XLA.

transformers' ``gradient_checkpointing_enable`` ends in ``torch.utils.checkpoint``, which looks for ``torch.xla`` and
fails; torch_xla's own function adds the optimization barriers without which XLA merges the recomputation away.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch_xla.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Recompute each decoder layer in the backward pass."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = _checkpoint


def _checkpoint(function: Any, *arguments: Any) -> Any:
    return checkpoint(function, *arguments, use_reentrant=True)
