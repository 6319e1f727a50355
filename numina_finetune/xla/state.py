"""How sharded state on the devices is planned for saving, and when it may be touched."""

from __future__ import annotations

import dataclasses

import torch
import torch_xla
import torch_xla.core.xla_model as xm
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch_xla.experimental.distributed_checkpoint import SPMDSavePlanner


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
