"""Own mixed precision: fp32 master weights, cast to the compute type where they are used.

Accelerate's autocast upcasts logits and breaks attention on XLA, so it stays off. A parametrization is evaluated at
each access of a weight, inside a checkpointed layer's recomputation too, and its backward adds the gradient to the
fp32 master.
"""

from __future__ import annotations

import re

import torch
from torch import nn
from torch.nn.utils import parametrize

WEIGHT_DTYPES = {"bf16": torch.float32, "pure-bf16": torch.bfloat16, "fp32": torch.float32}
"""Type of the trained weights (and so of the optimizer's moments) under each ``--precision``."""
COMPUTE_DTYPES = {"bf16": torch.bfloat16, "pure-bf16": torch.bfloat16, "fp32": torch.float32}
"""What the model's products are computed in."""
EXPORT_DTYPES = {"bf16": torch.bfloat16, "pure-bf16": torch.bfloat16, "fp32": torch.float32}
"""Type of the exported weights: the one the model was trained to compute with."""


class CastTo(nn.Module):
    """Parametrization that presents a weight in the compute type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(self.dtype)


def apply_precision(model: nn.Module, precision: str) -> None:
    """Make ``model``, still on the CPU and its weights of the master type, compute in ``precision``.

    On the CPU, because registering a parametrization ends in ``Tensor.set_``, which freezes an XLA tensor.
    """
    if precision != "bf16":
        return
    cast = CastTo(torch.bfloat16)
    for module in list(model.modules()):
        for name in [name for name, parameter in module.named_parameters(recurse=False)]:
            parametrize.register_parametrization(module, name, cast, unsafe=True)


def canonical_name(name: str) -> str:
    """The Hugging Face name of a parameter that may have been parametrized."""
    return re.sub(r"parametrizations\.(\w+)\.original$", r"\1", name)
