"""The native backend: one process a device, on CPUs and GPUs, through Accelerate: DDP or FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from numina_finetune import accelerate_settings
from numina_finetune.checkpoint.shards import COPIES, CopyingPlanner, HostCopies, Shard, ShardReader, Snapshots
from numina_finetune.config import RunConfig
from numina_finetune.data.loader import NO_LOSS, Batch
from numina_finetune.errors import ConfigError
from numina_finetune.models.generation import PlainDecoder, at_rest
from numina_finetune.models.precision import COMPUTE_DTYPES, apply_precision, canonical_name
from numina_finetune.models.stream import Weights, fill
from numina_finetune.processes import ProcessGroup
from numina_finetune.torch_native.attention import attention_for, use_attention
from numina_finetune.torch_native.batches import on_device
from numina_finetune.torch_native.compilation import compile_layers
from numina_finetune.torch_native.memory import explained, fits_twice
from numina_finetune.torch_native.mesh import native_mesh
from numina_finetune.torch_native.recomputation import recompute
from numina_finetune.torch_native.sharding import Sharded, whole_bytes
from numina_finetune.train.backend import (
    Decoding,
    DeviceBatch,
    DeviceMetrics,
    Ended,
    StepMetrics,
    metrics_from_rows,
)
from numina_finetune.train.decoding import decode
from numina_finetune.train.loss import CausalLoss
from numina_finetune.train.optim import make_optimizer, named_state
from numina_finetune.train.speed import Chips
from numina_finetune.train.step import optimizer_step


class NativeBackend:
    """Implements :class:`numina_finetune.train.backend.Backend`; the numerical reference for the others.

    Raises:
        ConfigError: the mesh has other axes than data and fsdp, or does not multiply to the number of processes.
    """

    name = "native"

    def __init__(self, config: RunConfig) -> None:
        on_cpu = accelerate_settings.asks_for(accelerate_settings.USE_CPU) or not torch.cuda.is_available()
        with accelerate_settings.hidden():
            state = PartialState(cpu=on_cpu)
        if state.distributed_type == DistributedType.XLA:
            raise ConfigError(
                "--backend native, but Accelerate has already chosen XLA: set USE_TORCH_XLA=false in the environment"
            )
        self.mesh_shape = native_mesh(config.mesh, state.num_processes)
        self._splits = self.mesh_shape.fsdp > 1
        with accelerate_settings.hidden():
            self.accelerator = Accelerator(
                mixed_precision="no",
                cpu=on_cpu,
                project_dir=str(config.run_dir),
                rng_types=[],
            )
        self.process_index, self.process_count = state.process_index, state.num_processes
        self.data_parallel_size, self.replicas_per_process = self.process_count, 1
        self.processes = ProcessGroup()
        self._copies = HostCopies()
        self._snapshots = Snapshots(self.processes, lambda: CopyingPlanner(self._copies), threads=COPIES)
        self.device = self.accelerator.device
        self.chips = Chips(self.process_count, None)
        self.device_description = f"native torch on {self.device.type}, {self.process_count} process(es)" + (
            f", FSDP2 on the mesh {self.mesh_shape}" if self._splits else ""
        )

    def place(
        self, model: PreTrainedModel, config: RunConfig, weights: Weights | None = None, *, trained: bool = True
    ) -> None:
        attention = attention_for(config.attention, model.config, self.device, COMPUTE_DTYPES[config.precision])
        use_attention(model.config, attention)
        self._fixed_shape = config.torch_compile or attention == "torch"
        if not config.torch_compile:
            recompute(model, config.remat)
        self._model, self._precision = model, config.precision
        self._module: nn.Module = CausalLoss(model).train()
        self._sharded: Sharded | None = None
        with explained(self.device):
            if self._splits:
                self._sharded = Sharded(self.accelerator, self._module, self.mesh_shape, config.precision)
                self._sharded.fill(model, weights, self.device)
            else:
                fill(model, weights)
                apply_precision(model, config.precision)
                model.to(self.device)
            if config.torch_compile:
                compile_layers(model, config.remat)
            self._parameters = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
            self._decode_step = self._module.next_logits
            if not trained:
                return
            self._optimizer = make_optimizer(self._parameters, config, fused=True)
            if self._sharded is None:
                with accelerate_settings.hidden():
                    self._module = self.accelerator.prepare(self._module)
        self._max_grad_norm, self._gradient_noise = config.max_grad_norm, config.gradient_noise
        self._copies.reserve(self._snapshots.pieces(self._state()))

    def put_batch(self, rows: Batch) -> DeviceBatch:
        return on_device(rows, self.device, fixed_shape=self._fixed_shape)

    def step(self, batches: Sequence[DeviceBatch], learning_rate: float) -> DeviceMetrics:
        with explained(self.device):
            return optimizer_step(
                partial(self._backward, batches),
                list(self._parameters.values()),
                batches,
                self._optimizer,
                learning_rate,
                max_grad_norm=self._max_grad_norm,
                reduce=self._sum_over_processes,
                gradient_scale=1.0 if self._sharded else float(self.process_count),  # DDP gives means
                foreach=None,
                gradient_noise=self._gradient_noise,
            )

    def read(self, metrics: Sequence[DeviceMetrics]) -> list[StepMetrics]:
        return metrics_from_rows(torch.stack(list(metrics)).cpu())

    def nonfinite(self) -> list[str]:
        parts = [p.to_local() if isinstance(p, DTensor) else p for p in self._parameters.values()]
        flags = torch.stack([(~torch.isfinite(part.detach())).any() for part in parts])
        wrong = self._sum_over_processes(flags.float()).tolist()
        return [name for name, count in zip(self._parameters, wrong, strict=True) if count]

    def evaluate(self, batches: Iterable[DeviceBatch]) -> tuple[float, int]:
        totals = torch.zeros(2, device=self.device, dtype=torch.float64)
        self._module.eval()
        with torch.no_grad(), self._forward_passes(), explained(self.device):
            for batch in batches:
                totals[0] += self._module(**batch)
                totals[1] += (batch["labels"] != NO_LOSS).sum()
        self._module.train()
        loss, tokens = self._sum_over_processes(totals).tolist()
        return loss, int(tokens)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        ended: Ended | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> list[list[int]]:
        in_step = self.process_count == 1 or self._sharded is not None
        with at_rest(self._model), self._forward_passes(), explained(self.device):
            own = decode(
                PlainDecoder(self._model, self._decode_step),
                prompts,
                decoding,
                ended,
                rows=-(-decoding.batch_size // self.process_count),
                share=(self.process_index, self.process_count),
                any_busy=self.processes.any if self._sharded else None,
                stop=stop if in_step else None,
            )
        by_prompt = {number: row for found in self.processes.gather(own) for number, row in found.items()}
        return [by_prompt[number] for number in range(len(prompts))]

    def snapshot(self) -> list[Shard]:
        return self._snapshots.take(self._state())

    def restore(self, shards: ShardReader) -> None:
        shards.fill(self._state())

    def start_profile(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = (
            folder / f"process-{self.process_index}.pt.trace.json",
            torch.profiler.profile(activities=activities),
        )
        self._profile[1].start()

    def stop_profile(self) -> None:
        path, profile = self._profile
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        profile.stop()
        profile.export_chrome_trace(str(path))

    def compile_seconds(self) -> float:
        return 0.0

    def summary(self) -> str:
        return "eager execution: no graph to compile"

    def _state(self) -> dict[str, Any]:
        return named_state(self._parameters, self._optimizer)

    def _backward(self, batches: Sequence[DeviceBatch], scale: torch.Tensor) -> torch.Tensor:
        """The summed loss of this process; replicas exchange gradients with those of the last micro-batch."""
        losses = []
        for number, batch in enumerate(batches, start=1):
            with self._exchange(last=number == len(batches)):
                loss = self._module(**batch)
                torch.autograd.backward(loss * scale)
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _sum_over_processes(self, value: torch.Tensor) -> torch.Tensor:
        if self.process_count > 1:
            dist.all_reduce(value)
        return value

    def _exchange(self, *, last: bool) -> AbstractContextManager[None]:
        """Around a backward pass, the last one of an optimizer step or one before it."""
        if self._sharded is not None:
            self._sharded.before_backward(last=last)
            return nullcontext()
        if last or self.process_count == 1:
            return nullcontext()
        context: AbstractContextManager[None] = self.accelerator.no_sync(self._module)
        return context

    def _forward_passes(self) -> AbstractContextManager[None]:
        """Around forward passes without gradients."""
        if self._sharded is None:
            return nullcontext()
        kept = not self.processes.any(not fits_twice(whole_bytes(self._model, self._precision), self.device))
        return self._sharded.gathered(kept=kept)
