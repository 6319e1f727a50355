"""What the native backend makes of a micro-batch before it goes to the device.

The host knows where packed samples begin and which tokens have a loss. So the device need not compute padding, nor
attention between samples, nor logits that nobody asks for, and nothing has to be read back to find that out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from numina_finetune.data.loader import NO_LOSS, Batch


@dataclass(frozen=True)
class Segments:
    """Where the packed samples of a micro-batch are, its rows laid end to end."""

    lengths: tuple[int, ...]
    """Tokens of each one, one after the other; they make up the whole micro-batch."""
    starts: torch.Tensor
    """int32 ``[segments + 1]`` on the device: where each begins, and the end."""


def on_device(rows: Batch, device: torch.device, *, fixed_shape: bool) -> dict[str, Any]:
    """The arguments of `numina_finetune.train.loss.CausalLoss` for a micro-batch.

    Args:
        fixed_shape: keep ``[rows, seq]``, padding included; else ``[1, tokens]`` without it.

    Returns:
        int32 tensors by name, ``supervised`` (int64 ``[count]``, at least one) and ``segments``.
    """
    arrays = rows._asdict()
    if not fixed_shape:
        kept = np.flatnonzero(rows.segment_ids)
        kept = kept if len(kept) else np.zeros(1, np.int64)  # a model is not made for no tokens at all
        arrays = {name: array.reshape(-1)[kept][None] for name, array in arrays.items()}
    bounds = _bounds(arrays["segment_ids"], arrays["position_ids"])
    supervised = np.flatnonzero(arrays["labels"] != NO_LOSS)
    arrays["supervised"] = supervised if len(supervised) else np.zeros(1, np.int64)
    arrays["starts"] = bounds
    tensors = {name: _moved(array, device) for name, array in arrays.items()}
    segments = Segments(tuple(np.diff(bounds).tolist()), tensors.pop("starts"))
    return {**tensors, "segments": segments}


def _bounds(segment_ids: NDArray[np.int32], position_ids: NDArray[np.int32]) -> NDArray[np.int32]:
    """int32 ``[segments + 1]``: the places at which a segment (or a row's padding) begins, and the end."""
    begins = np.ones(segment_ids.shape, bool)  # each row's first token
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    # Without padding, the last sample of a row and the first one of the next may have the same number.
    begins |= (position_ids == 0) & (segment_ids > 0)
    return np.append(np.flatnonzero(begins), segment_ids.size).astype(np.int32)


def _moved(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
