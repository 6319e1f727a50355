"""Accelerate's ``save_state`` and ``load_state`` as the one door, with our own sharded payload.

Accelerate's stock payload gathers the whole model into every host's memory, and cannot be loaded again on XLA. Its
hooks let the backend hand over its shards instead; the optimizer is never given to Accelerate, so that nothing of it
is gathered either. What Accelerate itself writes is small, and passes through a temporary folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from accelerate import Accelerator

from numina_finetune.checkpoint.progress import Progress
from numina_finetune.checkpoint.shards import Shard, ShardReader
from numina_finetune.checkpoint.upload import Captured
from numina_finetune.processes import ProcessGroup

_SCRATCH = "numina-state-"


class StateOwner(Protocol):
    """The part of a backend that checkpoints need."""

    accelerator: Accelerator
    processes: ProcessGroup
    process_index: int
    process_count: int

    def snapshot(self) -> list[Shard]: ...

    def restore(self, shards: ShardReader) -> None: ...


class StateDoor:
    """Everything that a run goes on from, in and out through Accelerate."""

    def __init__(self, owner: StateOwner, progress: Progress) -> None:
        self._owner = owner
        self._shards: list[Shard] = []
        self._reader: ShardReader | None = None
        owner.accelerator.register_save_state_pre_hook(self._on_save)
        owner.accelerator.register_load_state_pre_hook(self._on_load)
        owner.accelerator.register_for_checkpointing(progress)

    def capture(self) -> Captured:
        """The state as it is now, copied to host memory. Collective; training may go on at once."""
        with TemporaryDirectory(prefix=_SCRATCH) as folder:
            self._owner.accelerator.save_state(folder)
            small = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
        shards, self._shards = self._shards, []
        return Captured(shards, small)

    def restore(self, shards: ShardReader, small: Mapping[str, bytes]) -> None:
        """Put the state back in place.

        Raises:
            Damaged, NotFound: a shard is not what was written; some of the state may have been replaced already.
        """
        with TemporaryDirectory(prefix=_SCRATCH) as folder:
            for name, data in small.items():
                (Path(folder) / name).write_bytes(data)
            self._reader = shards
            self._owner.accelerator.load_state(folder)
            self._reader = None

    def _on_save(self, models: list[Any], weights: list[Any], output_dir: str) -> None:
        weights.clear()
        self._shards = self._owner.snapshot()

    def _on_load(self, models: list[Any], input_dir: str) -> None:
        models.clear()
        assert self._reader is not None
        self._owner.restore(self._reader)
