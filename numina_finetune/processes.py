"""Small messages between the processes of one run, over gloo and host memory: no device is involved."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others; longer than any compilation that only some of them go through."""


class ProcessGroup:
    """All processes of the run; trivial where there is one."""

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if several else None

    @property
    def index(self) -> int:
        """This process's number, from 0."""
        return 0 if self._group is None else dist.get_rank(self._group)

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on any process; the same answer on all."""
        if self._group is None:
            return flag
        votes = torch.tensor(int(flag), dtype=torch.int32)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._group)
        return bool(votes.item())

    def broadcast(self, value: Any) -> Any:
        """Process 0's value, on every process."""
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by process index, on all of them."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values

    def barrier(self) -> None:
        """Wait for every process."""
        if self._group is not None:
            dist.barrier(group=self._group)
