"""A small state with a real Accelerator around it: what checkpoints need of a run, without a model to train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from numina_finetune.checkpoint.attempts import open_attempt
from numina_finetune.checkpoint.manager import CheckpointManager
from numina_finetune.checkpoint.progress import Progress
from numina_finetune.checkpoint.shards import COPIES, CopyingPlanner, HostCopies, Shard, ShardReader, Snapshots
from numina_finetune.checkpoint.state import StateDoor
from numina_finetune.processes import ProcessGroup
from numina_finetune.storage import Store

SHAPES = {"embed": (64, 32), "layer.weight": (32, 48), "layer.bias": (48,), "norm": (32,), "none": (0, 4)}


class Owner:
    """Tensors under two names each, as a model and its optimizer have them."""

    def __init__(self, shapes: dict[str, tuple[int, ...]] | None = None) -> None:
        self.accelerator = Accelerator(cpu=True, rng_types=[])
        self.processes = ProcessGroup()
        self.process_index, self.process_count = self.accelerator.process_index, self.accelerator.num_processes
        self.state: dict[str, Any] = {
            "model": {name: torch.zeros(shape) for name, shape in (shapes or SHAPES).items()},
            "optim": {name: {"step": torch.zeros(())} for name in (shapes or SHAPES)},
        }
        self._copies = HostCopies()
        self._snapshots = Snapshots(self.processes, lambda: CopyingPlanner(self._copies), threads=COPIES)

    def make_step(self, step: int) -> None:
        """Give every tensor the values that belong to the step."""
        for number, (name, tensor) in enumerate(self.state["model"].items()):
            tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape) * (number + 1.0) + step)
            self.state["optim"][name]["step"].fill_(step)

    def is_at(self, step: int) -> bool:
        """Whether every tensor has the values that belong to the step."""
        other = Owner.__new__(Owner)
        other.state = {
            "model": {name: torch.zeros_like(tensor) for name, tensor in self.state["model"].items()},
            "optim": {name: {"step": torch.zeros(())} for name in self.state["model"]},
        }
        other.make_step(step)
        return all(
            torch.equal(self.state["model"][name], other.state["model"][name])
            and torch.equal(self.state["optim"][name]["step"], other.state["optim"][name]["step"])
            for name in self.state["model"]
        )

    def snapshot(self) -> list[Shard]:
        return self._snapshots.take(self.state)

    def restore(self, shards: ShardReader) -> None:
        shards.fill(self.state)


@dataclass
class Life:
    """One life of a run in the store."""

    owner: Owner
    progress: Progress
    checkpoints: CheckpointManager
    attempt: int

    def step(self, step: int) -> None:
        self.owner.make_step(step)
        self.progress.step = step

    def save(self, step: int, *, wait: bool = True) -> bool:
        self.step(step)
        return self.checkpoints.save(step, wait=wait)


def begin(
    store: Store,
    *,
    keep: int = 3,
    asynchronous: bool = True,
    remaining: Callable[[], float | None] = lambda: None,
    before_commit: Callable[[], None] = lambda: None,
    shapes: dict[str, tuple[int, ...]] | None = None,
) -> Life:
    """Another life of the run in ``store``."""
    owner, progress = Owner(shapes), Progress()
    number = owner.processes.broadcast(open_attempt(store).number if owner.process_index == 0 else None)
    manager = CheckpointManager(
        store,
        number,
        StateDoor(owner, progress),
        owner.processes,
        hosts=owner.process_count,
        keep=keep,
        facts={"data_key": "d"},
        asynchronous=asynchronous,
        remaining=remaining,
        before_commit=before_commit,
    )
    return Life(owner, progress, manager, number)
