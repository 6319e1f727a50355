"""Accelerate's ``save_state`` and ``load_state`` as the one door, with our own sharded payload.

Accelerate's stock payload gathers the whole model into every host's memory, and cannot be loaded again on XLA. Its
hooks let the weights be written by the backend instead; the optimizer is never given to Accelerate, so that nothing
of it is gathered either.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator

from numina_finetune.checkpoint.progress import Progress
from numina_finetune.processes import ProcessGroup

STATE_FOLDER = "state"
"""Inside a checkpoint: the model and optimizer shards."""


class StateOwner(Protocol):
    """The part of a backend that checkpoints need."""

    accelerator: Accelerator
    processes: ProcessGroup
    process_index: int

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


def attach(owner: StateOwner, progress: Progress) -> None:
    """Make the owner's Accelerator save and load this run's state."""

    def save(models: list[Any], weights: list[Any], output_dir: str) -> None:
        weights.clear()
        owner.save(Path(output_dir) / STATE_FOLDER)

    def load(models: list[Any], input_dir: str) -> None:
        models.clear()
        owner.load(Path(input_dir) / STATE_FOLDER)

    owner.accelerator.register_save_state_pre_hook(save)
    owner.accelerator.register_load_state_pre_hook(load)
    owner.accelerator.register_for_checkpointing(progress)
