"""The device's memory: what fits, and what to say where something did not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from numina_finetune.errors import ConfigError


def fits_twice(size: int, device: torch.device) -> bool:
    """Whether twice so many bytes are free on a GPU; of a CPU's memory, True."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused >= 2 * size


@contextmanager
def explained(device: torch.device) -> Iterator[None]:
    """Work on the device.

    Raises:
        ConfigError: its memory does not suffice.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the memory of {device} is too small for this run ({str(error).splitlines()[0]}): lower "
            "--per-device-train-batch-size (a higher --gradient-accumulation-steps keeps the batch) or "
            "--max-seq-length, use --gradient-checkpointing (--remat full), split the weights over more GPUs "
            "(--mesh fsdp=N), or train adapters (--lora-rank 16)"
        ) from error
