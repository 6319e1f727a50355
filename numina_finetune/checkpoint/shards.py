"""Sharded tensors to and from a folder: torch.distributed.checkpoint, with its chatter left out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save


def save_shards(state: dict[str, Any], folder: Path, planner: SavePlanner | None = None) -> None:
    """Write each shard once; with several processes, each writes its own. Collective."""
    with _quiet():
        save(state, storage_writer=FileSystemWriter(folder), planner=planner, no_dist=not dist.is_initialized())


def load_shards(
    state: dict[str, Any], folder: Path, planner: LoadPlanner | None = None, *, alone: bool | None = None
) -> None:
    """Fill ``state``'s tensors in place, whatever mesh wrote the folder.

    Args:
        alone: True where only this process reads; None = all processes together, if there are several.
    """
    no_dist = not dist.is_initialized() if alone is None else alone
    with _quiet():
        load(state, storage_reader=FileSystemReader(folder), planner=planner, no_dist=no_dist)


@contextmanager
def _quiet() -> Iterator[None]:
    """Deprecations inside torch and torch_xla, and the remark that one process is alone, are no news to a user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
