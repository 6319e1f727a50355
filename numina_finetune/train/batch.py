"""How many rows an optimizer step takes, and how they are cut into micro-batches."""

from __future__ import annotations

import math
from dataclasses import dataclass

from numina_finetune.config import RunConfig
from numina_finetune.errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """``global_batch = rows_per_micro_batch x accumulation``."""

    rows_per_micro_batch: int
    """Rows of one forward pass over all data-parallel replicas."""
    accumulation: int
    """Micro-batches in one optimizer step."""

    @property
    def global_batch(self) -> int:
        """Rows in one optimizer step, over all devices and micro-batches."""
        return self.rows_per_micro_batch * self.accumulation


def plan_batch(config: RunConfig, data_parallel_size: int, run_global_batch: int | None) -> BatchPlan:
    """The batch on this mesh.

    Args:
        run_global_batch: what the run began with, which a later life keeps by deriving the accumulation anew.

    Raises:
        ConfigError: the global batch is not a whole number of micro-batches on this mesh.
    """
    rows = config.per_device_train_batch_size * data_parallel_size
    wanted = run_global_batch or config.global_batch_size or rows * config.gradient_accumulation_steps
    if wanted % rows:
        whose = "this run began with" if run_global_batch else "--global-batch-size asks for"
        raise ConfigError(
            f"{whose} {wanted} rows an optimizer step, which is no multiple of {rows} = "
            f"{config.per_device_train_batch_size} rows a device x {data_parallel_size} data-parallel replicas: "
            f"use a --per-device-train-batch-size that divides {wanted / data_parallel_size:g}, or another --mesh"
        )
    return BatchPlan(rows, wanted // rows)


def plan_steps(config: RunConfig, rows: int, global_batch: int) -> int:
    """Optimizer steps of the whole run: ``--max-steps``, or enough for ``rows``."""
    return config.max_steps if config.max_steps > 0 else math.ceil(rows / global_batch)
