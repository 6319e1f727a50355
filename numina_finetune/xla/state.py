"""How sharded state on the devices is planned for saving and loading, and when it may be touched."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch_xla
import torch_xla.core.xla_model as xm
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, WriteItem
from torch_xla.experimental.distributed_checkpoint import SPMDLoadPlanner, SPMDSavePlanner


def settle() -> None:
    """Wait until every tensor has its value on the devices.

    ``sync(wait=True)`` waits for what it starts itself, which is nothing where an earlier sync is still under way; the
    shards of a tensor under way cannot be asked for ("an async operation is in flight").
    """
    torch_xla.sync(wait=True)
    xm.wait_device_ops()


class SavePlanner(SPMDSavePlanner):  # type: ignore[misc]
    """Plans one write for a shard of which this host holds several replicas, and gives each as a CPU tensor.

    torch_xla's own planner lists all replicas, and its deduplication, made for replicas on different hosts, then drops
    every one of them: on a mesh such as data=2,tensor=2 the checkpoint would lack its matrices.
    """

    def create_local_plan(self) -> SavePlan:
        plan: SavePlan = super().create_local_plan()
        # The first of equal (name, offset) is kept: items of tensors that are not sharded have no twin.
        once = {(item.index.fqn, item.index.offset): item for item in reversed(plan.items)}
        return dataclasses.replace(plan, items=list(reversed(once.values())))

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        # All replicas of a tensor's shards come to the host with the first one that is asked for. The tensor's items
        # follow one another: what is left of the tensor before is of no use.
        if write_item.index.fqn not in self._local_shards:
            self._local_shards.clear()
        tensor: torch.Tensor = super().resolve_data(write_item).cpu()
        return tensor


class LoadPlanner(SPMDLoadPlanner):  # type: ignore[misc]
    """Gives tensors that are not split their values as wholes.

    Every write to a part of a tensor on the devices makes the tensor anew. The step of a resumed attempt would then
    have its tensors in another order than the first attempt's: it would be another program, and compiled.
    """

    def __init__(self) -> None:
        super().__init__()
        self._wholes: dict[str, torch.Tensor] = {}

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        if index.fqn not in self.unsharded_state_dict:
            found: torch.Tensor = super().lookup_tensor(index)
            return found
        if index.fqn not in self._wholes:
            tensor = self.unsharded_state_dict[index.fqn]
            self._wholes[index.fqn] = torch.empty(tensor.shape, dtype=tensor.dtype)
            self._pending_elements[index.fqn] = tensor.numel()
        return self._wholes[index.fqn]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        name = read_item.dest_index.fqn
        if name not in self.unsharded_state_dict:
            super().commit_tensor(read_item, tensor)
            return
        self._pending_elements[name] -= math.prod(read_item.lengths)
        if self._pending_elements[name] == 0:
            self.unsharded_state_dict[name].copy_(self._wholes.pop(name))
