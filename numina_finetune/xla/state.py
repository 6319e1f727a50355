"""Sharded model and optimizer state, to and from a folder, through torch.distributed.checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch_xla
import torch_xla.core.xla_model as xm
from torch.distributed.checkpoint.planner import SavePlan
from torch_xla.experimental.distributed_checkpoint import SPMDLoadPlanner, SPMDSavePlanner

from numina_finetune.checkpoint.shards import load_shards, save_shards


def save_sharded(state: dict[str, Any], folder: Path) -> None:
    """Write every shard once; each host writes its own."""
    _settle()
    save_shards(state, folder, _SavePlanner())


def load_sharded(state: dict[str, Any], folder: Path) -> None:
    """Fill ``state``'s tensors in place, whatever mesh wrote the folder."""
    _settle()
    load_shards(state, folder, SPMDLoadPlanner())
    _settle()


def _settle() -> None:
    """Wait until every tensor has its value on the devices.

    ``sync(wait=True)`` waits for what it starts itself, which is nothing where an earlier sync is still under way; the
    shards of a tensor under way cannot be asked for ("an async operation is in flight").
    """
    torch_xla.sync(wait=True)
    xm.wait_device_ops()


class _SavePlanner(SPMDSavePlanner):  # type: ignore[misc]
    """Plans one write for a shard of which this host holds several replicas.

    torch_xla's own planner lists them all, and its deduplication, made for replicas on different hosts, then drops
    every one of them: on a mesh such as data=2,tensor=2 the checkpoint would lack its matrices.
    """

    def create_local_plan(self) -> SavePlan:
        plan: SavePlan = super().create_local_plan()
        # The first of equal (name, offset) is kept: items of tensors that are not sharded have no twin.
        once = {(item.index.fqn, item.index.offset): item for item in reversed(plan.items)}
        return dataclasses.replace(plan, items=list(reversed(once.values())))
