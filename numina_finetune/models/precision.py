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


_ROUTER = re.compile(r"\bmlp\.router\.\w+$")
"""Parameters that choose the experts: in bf16, near-equal scores would choose by rounding."""


def compute_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """What the parameter ``name`` is computed with in a model that computes in ``dtype``."""
    return torch.promote_types(dtype, torch.float32) if _ROUTER.search(name) else dtype


def widen_routers(model: nn.Module) -> None:
    """Let routers take what comes to them in fp32 or more, as their weights are."""
    for name, module in model.named_modules():
        if _ROUTER.search(f"{name}.weight"):
            module.register_forward_pre_hook(_widen)


def _widen(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    (hidden,) = arguments
    return (hidden.to(torch.promote_types(hidden.dtype, torch.float32)),)


def contracted(equation: str, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``torch.einsum`` of two tensors, in their own type on every device.

    torch_xla's einsum cannot be told a precision: a TPU would multiply fp32 values in bf16. Its products of matrices
    can, but take dimensions together, each of which may be split over an axis of the mesh of its own. So here none are:
    where the result shares several dimensions with both tensors, it is no product of matrices; where several are summed
    over, all but the last are summed after the product. In bf16 there is nothing to lose by einsum.

    Args:
        equation: such as ``eti,eih->th``: each tensor has one dimension that the other has not.
    """
    if left.device.type != "xla" or left.dtype == torch.bfloat16:
        return torch.einsum(equation, left, right)
    given, made = equation.split("->")
    of_left, of_right = given.split(",")
    both = [name for name in of_left if name in of_right]
    kept, summed = ([name for name in both if (name in made) == is_kept] for is_kept in (True, False))
    (row,), (column,) = ([name for name in of if name not in both] for of in (of_left, of_right))
    *later, inner = summed

    def arranged(tensor: torch.Tensor, of: str, *own: str) -> torch.Tensor:
        return tensor.permute([of.index(name) for name in (*later, *kept, *own)])

    if len(kept) > 1:
        product = arranged(left, of_left, row, inner).unsqueeze(-2) * arranged(
            right, of_right, column, inner
        ).unsqueeze(-3)
        product = product.sum(-1)
    else:
        product = torch.matmul(arranged(left, of_left, row, inner), arranged(right, of_right, inner, column))
    product = product.sum(list(range(len(later)))) if later else product
    return product.permute([[*kept, row, column].index(name) for name in made])


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
    widen_routers(model)
    dtype = COMPUTE_DTYPES[precision]
    for prefix, module in list(model.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            presented = compute_dtype(f"{prefix}.{name}", dtype)
            if presented != parameter.dtype:
                parametrize.register_parametrization(module, name, CastTo(presented), unsafe=True)


def canonical_name(name: str) -> str:
    """The Hugging Face name of a parameter that may have been parametrized."""
    return re.sub(r"parametrizations\.(\w+)\.original$", r"\1", name)
