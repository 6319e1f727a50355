"""Where activations lie on the mesh: one table, and the functions that tell XLA's partitioner.

Without them the partitioner may follow a weight's split, and exchange activations rather than weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch_xla
import torch_xla.distributed.spmd as xs

from numina_finetune.config import BATCH_AXES, SHARD_AXES
from numina_finetune.mesh import MeshShape
from numina_finetune.xla.sharding import PartitionSpec, whole

REPLICA_AXES = tuple(axis for axis in BATCH_AXES if axis not in SHARD_AXES)

ACTIVATIONS: dict[str, PartitionSpec] = {
    # [batch, seq, hidden], between layers
    "hidden": (BATCH_AXES, None, None),
    # [batch, seq, vocabulary]
    "logits": (BATCH_AXES, None, "tensor"),
    # [chunks, batch, seq / chunks, …], what the loss walks over
    "chunks": (None, BATCH_AXES, None),
    "hidden chunks": (None, BATCH_AXES, None, None),
    # [replicas, vocabulary, hidden]: each replica's own part of the head's gradient, summed once at the end
    "head gradients": (BATCH_AXES, "tensor", None),
    # the same, [replicas / shards, shards, vocabulary, hidden], before and after they are exchanged
    "head parts": (REPLICA_AXES, SHARD_AXES, "tensor", None),
    "head columns": (REPLICA_AXES, None, "tensor", SHARD_AXES),
    # The embedding is looked up where its columns lie, and the result exchanged: far less than the table itself, and
    # the gradient comes to be where the parameter is. [batch, seq] and [batch, seq, hidden].
    "looked up": (REPLICA_AXES, None),
    "columns": (REPLICA_AXES, None, SHARD_AXES),
    # [batch · seq, …], what experts take and give
    "tokens": (BATCH_AXES, None),
    # [batch, heads, seq, head_dim], [batch, seq] and [batch, heads, seq] in the attention kernel
    "heads": (BATCH_AXES, "tensor", None, None),
    "segments": (BATCH_AXES, None),
    "sums": (BATCH_AXES, "tensor", None),
}
"""Partition by what a tensor is."""

DECODING: dict[str, PartitionSpec] = ACTIVATIONS | {
    # One token a row is less than any weight: every device that has a part of the weights gets all of them.
    "hidden": (REPLICA_AXES, None, None),
}
"""The same where weights stay where they are, see :meth:`Constraints.weights_at_rest`."""


class Constraints:
    """Marks tensors for one mesh, which may be a larger one than that of the devices at hand."""

    def __init__(self, mesh: xs.Mesh, shape: MeshShape) -> None:
        self.mesh, self.shape = mesh, shape
        self._table = ACTIVATIONS

    @contextmanager
    def weights_at_rest(self) -> Iterator[None]:
        """Within, no weight is gathered for its product: the activations travel to the weights' parts."""
        self._table = DECODING
        try:
            yield
        finally:
            self._table = ACTIVATIONS

    def mark(self, tensor: torch.Tensor, spec: PartitionSpec) -> torch.Tensor:
        """``tensor``, split as ``spec`` says; its gradient is not marked."""
        # A tensor can be marked once, and its copy counts as marked; "* 1" begins anew, and XLA drops it.
        is_marked = torch_xla._XLAC._get_xla_sharding_spec(tensor)
        marked = tensor * 1 if is_marked else tensor.clone()
        xs.mark_sharding(marked, self.mesh, spec)
        return marked

    def place(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        """``tensor``, split as the table says of ``what``; its gradient is not marked."""
        return self.mark(tensor, self._table[what])

    def __call__(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        """``tensor`` and its gradient, split as the table says of ``what``."""
        marked: torch.Tensor = _Place.apply(tensor, self, what)  # type: ignore[no-untyped-call]
        return marked

    def gathered(
        self, weight: torch.Tensor, spec: PartitionSpec, dtype: torch.dtype, used: PartitionSpec | None = None
    ) -> torch.Tensor:
        """A weight of partition ``spec`` as the matrix product uses it: cast first, so that half the bytes travel.

        Args:
            used: its partition there; whole over the axes that split weights, if not given.
        """
        small, used = computed(weight, dtype), whole(spec) if used is None else used
        if self.shape.shards == 1 or used == spec:
            return small
        if self._table is DECODING:
            return self.mark(small, spec)
        return self.mark(self.mark(small, spec), used)


def computed(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``weight`` in the compute type, as the result of an operation; what has no value cannot be marked otherwise."""
    return weight * 1 if weight.dtype == dtype else weight.to(dtype)  # XLA drops "* 1"


class _Place(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, constraints: Constraints, what: str) -> torch.Tensor:
        ctx.constraints, ctx.what = constraints, what
        return constraints.place(tensor, what)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        return ctx.constraints.place(gradients[0], ctx.what), None, None
