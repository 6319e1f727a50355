"""Own mixed precision on a mesh: fp32 masters stay split; what is gathered for a product is the compute type.

The counterpart of `numina_finetune.models.precision`, whose cast alone would leave the partitioner free to gather the
fp32 master.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from numina_finetune.config import SHARD_AXES
from numina_finetune.xla.constraints import Constraints
from numina_finetune.xla.sharding import PartitionSpec


class Gathered(nn.Module):
    """Parametrization that presents a split weight as the product uses it; the gradient comes back split."""

    def __init__(self, spec: PartitionSpec, used: PartitionSpec, dtype: torch.dtype, constraints: Constraints) -> None:
        super().__init__()
        self._spec, self._used, self._dtype, self._constraints = spec, used, dtype, constraints

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        gathered: torch.Tensor = _Gather.apply(  # type: ignore[no-untyped-call]
            weight, self._spec, self._used, self._dtype, self._constraints
        )
        return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        spec: PartitionSpec,
        used: PartitionSpec,
        dtype: torch.dtype,
        constraints: Constraints,
    ) -> torch.Tensor:
        ctx.spec, ctx.constraints = spec, constraints
        return constraints.gathered(weight, spec, dtype, used)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        return ctx.constraints.mark(gradients[0], ctx.spec), None, None, None, None


def present_gathered(
    module: nn.Module,
    name: str,
    spec: PartitionSpec,
    used: PartitionSpec,
    dtype: torch.dtype,
    constraints: Constraints,
) -> None:
    """Let ``module.name``, still on the CPU or without a value, be used in the compute type and split as ``used``."""
    parametrize.register_parametrization(module, name, Gathered(spec, used, dtype, constraints), unsafe=True)


def master_of(module: nn.Module, name: str) -> torch.Tensor:
    """The trained parameter behind ``module.name``."""
    if parametrize.is_parametrized(module, name):
        master: torch.Tensor = module.parametrizations[name].original  # type: ignore[union-attr,index]
        return master
    plain: torch.Tensor = getattr(module, name)
    return plain


class SplitEmbedding(nn.Module):
    """The token embedding, looked up where its columns lie.

    Neither the table nor its gradient is ever whole on a device: what travels is the tokens' own rows.
    """

    def __init__(
        self, embedding: nn.Embedding, weight: nn.Parameter, dtype: torch.dtype, constraints: Constraints
    ) -> None:
        super().__init__()
        self.weight = weight
        self.padding_idx = embedding.padding_idx
        self._dtype, self._constraints = dtype, constraints

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """``[batch, seq]`` to ``[batch, seq, hidden]`` in the compute type."""
        rows: torch.Tensor = _Lookup.apply(  # type: ignore[no-untyped-call]
            input_ids, self.weight, self.padding_idx, self._dtype, self._constraints
        )
        return self._constraints(rows, "hidden")


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input_ids: torch.Tensor,
        weight: torch.Tensor,
        padding: int | None,
        dtype: torch.dtype,
        constraints: Constraints,
    ) -> torch.Tensor:
        ids = constraints.place(input_ids * 1, "looked up")
        ctx.save_for_backward(ids)
        ctx.rows, ctx.padding, ctx.constraints = weight.shape[0], padding, constraints
        return constraints.place(nn.functional.embedding(ids, weight).to(dtype), "columns")

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        (ids,) = ctx.saved_tensors
        # A frequent token adds up thousands of rows: in fp32, whatever the model computes in.
        given = ctx.constraints.place(gradients[0], "columns")
        given = given.to(torch.promote_types(given.dtype, torch.float32))
        padding = -1 if ctx.padding is None else ctx.padding
        gradient = torch.ops.aten.embedding_dense_backward(given, ids, ctx.rows, padding, False)
        return None, ctx.constraints.mark(gradient, ("tensor", SHARD_AXES)), None, None, None
