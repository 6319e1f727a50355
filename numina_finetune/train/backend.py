"""What the loop asks of a device library; implemented by ``xla`` and ``torch_native``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from numina_finetune.checkpoint.shards import Shard, ShardReader
from numina_finetune.config import RunConfig
from numina_finetune.data.loader import Batch
from numina_finetune.mesh import MeshShape
from numina_finetune.models.stream import Weights
from numina_finetune.processes import ProcessGroup
from numina_finetune.train.speed import Chips

DeviceBatch = Mapping[str, torch.Tensor]
"""``input_ids, labels, segment_ids, position_ids`` on the device, int32 ``[batch, seq]``."""
DeviceMetrics = torch.Tensor
"""fp32 ``[8 or 9]`` on the device: mean loss, gradient norm, supervised tokens, tokens, 1 if the update was made, the
trained weights' norm after it, what :func:`numina_finetune.train.noise.signal_and_noise` gives or NaN, and where
experts take a limited number of tokens, the share of assignments that were dropped."""


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, read back."""

    loss: float
    """Mean over the step's supervised tokens."""
    grad_norm: float
    """Global norm before clipping."""
    supervised: int
    """Tokens with loss, over all devices and micro-batches."""
    tokens: int
    """Tokens that are not padding."""
    applied: bool
    """False where a non-finite loss or gradient made the device skip the update."""
    weight_norm: float
    """Global norm of the trained weights after the step: not finite where one of them is not."""
    signal: float | None = None
    """|G|², the true gradient's squared norm as this step alone shows it; None where it is not measured."""
    noise: float | None = None
    """The variance of this step's gradient around it."""
    dropped_share: float | None = None
    """Of the assignments of tokens to experts; None where none can be dropped."""


@dataclass(frozen=True)
class Decoding:
    """How new tokens are chosen, and when a row ends."""

    max_new_tokens: int
    """Where a row is cut that has not ended."""
    stop_ids: frozenset[int]
    """Tokens that end a row."""
    pad_id: int
    """Fills batches; it is never attended to."""
    batch_size: int
    """Rows decoded together, over all devices; a backend takes the next number that its devices divide."""
    temperature: float = 0.0
    """0 = the likeliest token."""
    top_p: float = 1.0
    """Of the likeliest tokens those that together have this probability."""
    top_k: int = 0
    """Of so many of the likeliest tokens; 0 = of all."""
    seed: int = 0
    """What is drawn depends on it and on the prompt, not on what else is decoded."""


class DecodingStopped(Exception):
    """What was to be decoded was given up."""


Ended = Callable[[list[int]], bool]
"""Whether a row is over, from its new tokens."""


class Backend(Protocol):
    """Devices, and the one compiled step on them."""

    name: str
    """``xla`` or ``native``."""
    accelerator: Accelerator
    """Holds process state and trackers, and is the door through which checkpoints are saved."""
    device_description: str
    """What a person is told of the devices, in one line."""
    mesh_shape: MeshShape
    """Devices along each axis."""
    processes: ProcessGroup
    """Messages between the run's processes that involve no device."""
    process_index: int
    """Of this process, from 0."""
    process_count: int
    """Hosts on XLA, one process each; natively the processes that a launcher started."""
    data_parallel_size: int
    """Rows of a micro-batch are split over this many replicas."""
    replicas_per_process: int
    """Of which this process feeds so many, contiguous from ``process_index * replicas_per_process``."""
    chips: Chips
    """How many they are, and what they can do at most."""

    def place(
        self, model: PreTrainedModel, config: RunConfig, weights: Weights | None = None, *, trained: bool = True
    ) -> None:
        """Move the model to the devices, shard it, and make its optimizer.

        Args:
            weights: the values of parameters that have none (``meta``); None leaves them to :meth:`restore`.
            trained: False makes no optimizer: :meth:`evaluate` and :meth:`generate` are all that can be asked then.
        """

    def put_batch(self, rows: Batch) -> DeviceBatch:
        """This process's rows of one micro-batch, on the devices."""

    def step(self, batches: Sequence[DeviceBatch], learning_rate: float) -> DeviceMetrics:
        """One optimizer step; reads nothing back."""

    def read(self, metrics: Sequence[DeviceMetrics]) -> list[StepMetrics]:
        """The one place where training metrics come to the host, in one transfer."""

    def nonfinite(self) -> list[str]:
        """Hugging Face names of the parameters, frozen ones too, that hold values that are not finite. Collective."""

    def evaluate(self, batches: Iterable[DeviceBatch]) -> tuple[float, int]:
        """Summed loss and supervised tokens, over all processes."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        ended: Ended | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> list[list[int]]:
        """New tokens of each prompt, in order, with the token that ended the row; the same on every process.

        Collective: every process gives all prompts. Training goes on afterwards as if nothing had been.

        Args:
            ended: is asked on the host every few tokens, and ends a row that no stop token would end; the row may come
                back a few tokens longer than where it became true.
            stop: whether to give up, the same on every process; asked every few tokens and before each compilation,
                where all processes decode in step.

        Raises:
            ValueError: an empty prompt.
            DecodingStopped: as ``stop`` says.
        """

    def snapshot(self) -> list[Shard]:
        """This process's share of model and optimizer, copied to host memory, under Hugging Face parameter names.

        Collective the first time.
        """

    def restore(self, shards: ShardReader) -> None:
        """The inverse of :meth:`snapshot`, in place, from whatever mesh or backend wrote it."""

    def start_profile(self, folder: Path) -> None:
        """Record what the devices do from now on, into ``folder``."""

    def stop_profile(self) -> None:
        """End the recording, and write it."""

    def compile_seconds(self) -> float:
        """What this process has spent on making programs for its devices, or on reading kept ones back; 0 if eager."""

    def summary(self) -> str:
        """What the run cost in compilations and host reads, in one line."""


def metrics_from_rows(rows: torch.Tensor) -> list[StepMetrics]:
    """``[steps, 8 or 9]`` on the host to one record a step."""
    return [
        StepMetrics(
            *(loss, norm, int(supervised), int(tokens), bool(applied), weight_norm),
            *((signal, noise) if applied and math.isfinite(signal + noise) else (None, None)),
            *dropped,
        )
        for loss, norm, supervised, tokens, applied, weight_norm, signal, noise, *dropped in rows.tolist()
    ]


def say(backend: Backend, line: str) -> None:
    """Print a line, once for all processes."""
    if backend.process_index == 0:
        print(line, flush=True)
