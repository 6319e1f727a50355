"""The SPMD backend: one process a host, one program over all devices of all hosts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.profiler as profiler
import torch_xla.distributed.spmd as xs
import torch_xla.distributed.xla_backend
import torch_xla.runtime as xr
from accelerate import Accelerator
from transformers import PreTrainedModel

from numina_finetune import accelerate_settings
from numina_finetune.checkpoint.shards import Shard, ShardReader, Snapshots
from numina_finetune.config import RunConfig
from numina_finetune.data.loader import NO_LOSS, Batch
from numina_finetune.model_defaults import default_mesh
from numina_finetune.models.stream import Weights, progress
from numina_finetune.processes import ProcessGroup
from numina_finetune.train.backend import (
    Decoding,
    DeviceBatch,
    DeviceMetrics,
    Ended,
    StepMetrics,
    metrics_from_rows,
)
from numina_finetune.train.decoding import decode
from numina_finetune.train.optim import named_state
from numina_finetune.train.speed import Chips
from numina_finetune.xla.generation import MeshDecoder
from numina_finetune.xla.micro_batches import MicroBatches
from numina_finetune.xla.optimizer import make_optimizer
from numina_finetune.xla.placement import place_model, step_options
from numina_finetune.xla.programs import Programs, open_programs
from numina_finetune.xla.runtime import BATCH_SPEC, TrafficCounter, build_mesh, compile_seconds, peak_flops, start_spmd
from numina_finetune.xla.state import LoadPlanner, SavePlanner, settle
from numina_finetune.xla.step import train_step
from numina_finetune.xla.tensors import RuntimeTensors

_STORED_WITHIN = 10.0
"""Seconds that a run's end waits for compiled programs on their way to storage."""


class XlaBackend:
    """Implements :class:`numina_finetune.train.backend.Backend`.

    Raises:
        ConfigError: the mesh does not fit the devices, or the environment forbids training.
    """

    name = "xla"

    def __init__(self, config: RunConfig) -> None:
        devices = start_spmd()
        self._mesh, self.mesh_shape = build_mesh(config.mesh or default_mesh(config.model_name, devices), devices)
        self.process_index = int(xr.process_index())
        self.process_count = int(xr.process_count())
        if self.process_count > 1:
            dist.init_process_group("gloo", init_method="xla://")
        self.processes = ProcessGroup()
        self._snapshots = Snapshots(self.processes, SavePlanner)
        self.data_parallel_size = self.mesh_shape.data_parallel_size
        self.replicas_per_process = self.data_parallel_size // self.process_count
        self.device = torch_xla.device()
        self.chips = Chips(devices, peak_flops())
        self.device_description = (
            f"XLA SPMD on {devices} {xr.device_type()} devices, mesh {self.mesh_shape}, "
            f"{self.process_count} process(es)"
        )
        with accelerate_settings.hidden():
            self.accelerator = Accelerator(mixed_precision="no", project_dir=str(config.run_dir), rng_types=[])
        self._traffic = TrafficCounter()
        self._programs: Programs | None = None

    def place(
        self, model: PreTrainedModel, config: RunConfig, weights: Weights | None = None, *, trained: bool = True
    ) -> None:
        if config.compilation_cache:
            self._programs = open_programs(config.run_url if config.output_dir else None, self.processes)
        options = step_options(config, model, self.mesh_shape, device_type=xr.device_type())
        with progress(model.parameters()) as told:
            tensors = RuntimeTensors(self._mesh, self.device, weights, told)
            placed = place_model(model, options, self._mesh, self.mesh_shape, tensors)
        self._placed = replace(placed, module=self.accelerator.prepare(placed.module.train()))
        if trained:
            self._micro_batches = MicroBatches(self._placed)
            self._optimizer = make_optimizer(self._placed, config, tensors, options.platform)
        self._max_grad_norm, self._gradient_noise = config.max_grad_norm, config.gradient_noise
        torch_xla.sync()
        self._traffic.leave_out()

    def put_batch(self, rows: Batch) -> DeviceBatch:
        tensors = {name: torch.from_numpy(array) for name, array in rows._asdict().items()}
        # minibatch: with several hosts each one passes only its own rows of the global batch.
        spec = xs.ShardingSpec(self._mesh, BATCH_SPEC, minibatch=self.process_count > 1)
        moved = xm.send_cpu_data_to_device(list(tensors.values()), self.device, spec)
        return dict(zip(tensors, moved, strict=True))

    def step(self, batches: Sequence[DeviceBatch], learning_rate: float) -> DeviceMetrics:
        # A scalar 0 or 1 would be traced as a constant, and a schedule that ends in one compiled twice.
        rate = torch.tensor([learning_rate]).to(self.device).squeeze(0)
        metrics = train_step(
            self._placed,
            self._micro_batches,
            self._optimizer,
            batches,
            rate,
            max_grad_norm=self._max_grad_norm,
            gradient_noise=self._gradient_noise,
        )
        torch_xla.sync()
        self._traffic.count_step()
        return metrics

    def read(self, metrics: Sequence[DeviceMetrics]) -> list[StepMetrics]:
        rows = torch.stack(list(metrics)).cpu()
        self._traffic.leave_out()
        return metrics_from_rows(rows)

    def nonfinite(self) -> list[str]:
        stacking, names, flags = self._placed.stacking, list[str](), []
        for held, parameter in self._placed.parameters.items():
            members = stacking.members(held) if stacking else [held]
            names += members
            own = range(1 if len(members) > 1 else 0, parameter.ndim)
            flags.append((~torch.isfinite(parameter.detach())).float().amax(tuple(own)).reshape(-1))
        wrong = torch.cat(flags).cpu().tolist()
        self._traffic.leave_out()
        return [name for name, found in zip(names, wrong, strict=True) if found]

    def evaluate(self, batches: Iterable[DeviceBatch]) -> tuple[float, int]:
        losses, counts = [], []
        self._placed.module.eval()
        with torch.no_grad():
            for batch in batches:
                losses.append(self._placed.module(**batch))
                counts.append((batch["labels"] != NO_LOSS).sum())
                torch_xla.sync()
        self._placed.module.train()
        if not losses:
            return 0.0, 0
        # Read at the end alone, so that no batch waits for the host, and summed there: XLA has no float64 on a TPU.
        totals = float(torch.stack(losses).cpu().double().sum()), int(torch.stack(counts).cpu().sum())
        self._traffic.leave_out()
        return totals

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        ended: Ended | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> list[list[int]]:
        decoder = MeshDecoder(self._placed, self.device, decoding.batch_size)
        with self._traffic.generating(), decoder.at_rest():
            found = decode(decoder, prompts, decoding, ended, rows=decoder.rows, stop=stop)
        return [found[number] for number in range(len(prompts))]

    def snapshot(self) -> list[Shard]:
        settle()
        shards = self._snapshots.take(self._state())
        self._traffic.leave_out()
        stacking = self._placed.stacking
        return shards if stacking is None else [own for shard in shards for own in stacking.unstack(shard)]

    def restore(self, shards: ShardReader) -> None:
        settle()
        if self._placed.stacking is not None:
            shards = shards.arranged(self._placed.stacking.restack)
        shards.fill(self._state(), LoadPlanner())
        settle()
        self._traffic.leave_out()

    def start_profile(self, folder: Path) -> None:
        settle()
        profiler.start_trace(str(folder))

    def stop_profile(self) -> None:
        settle()
        profiler.stop_trace()
        self._traffic.leave_out()

    def compile_seconds(self) -> float:
        return compile_seconds()

    def summary(self) -> str:
        generated, read_back = self._traffic.generation_compilations, 0
        if self._programs is not None:
            self._programs.settle(_STORED_WITHIN)
            read_back = self._programs.read_back
        return (
            f"training-graph compilations: {self._traffic.training_compilations}; "
            f"host reads between log lines: {self._traffic.host_reads}; "
            f"operators outside XLA: {self._traffic.fallbacks}"
            + (f"; compilations for generation: {generated}" if generated else "")
            + (f"; programs read back instead of compiled: {read_back}" if read_back else "")
        )

    def _state(self) -> dict[str, Any]:
        return named_state(self._placed.parameters, self._optimizer)
