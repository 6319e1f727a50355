"""The training step of a run, traced on tensors that have no values, for a mesh of devices that are not there.

``python -m numina_finetune.xla.trace REQUEST.json`` writes the step as a module for the TPU's compiler, and a list of
its arguments. A program of its own, because the number of devices is fixed when torch_xla is imported.
"""

from __future__ import annotations

import gzip
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from numina_finetune.config import MESH_AXES, RunConfig
from numina_finetune.errors import ConfigError
from numina_finetune.mesh import MeshShape
from numina_finetune.models.attention import SEGMENT_ATTENTION
from numina_finetune.models.lora import add_adapters
from numina_finetune.models.precision import COMPUTE_DTYPES, WEIGHT_DTYPES
from numina_finetune.xla.loops import placeholder
from numina_finetune.xla.lowering import sharding_text, stablehlo
from numina_finetune.xla.micro_batches import MicroBatches
from numina_finetune.xla.optimizer import make_optimizer, state_spec
from numina_finetune.xla.placement import Placed, place_model, step_options
from numina_finetune.xla.runtime import BATCH_SPEC
from numina_finetune.xla.scopes import named_modules
from numina_finetune.xla.sharding import PartitionSpec
from numina_finetune.xla.step import train_step

BATCH_NAMES = ("input_ids", "labels", "segment_ids", "position_ids")


@dataclass(frozen=True)
class Argument:
    """One argument of the compiled step."""

    name: str
    kind: str
    """weights, optimizer, batch or other."""
    shape: tuple[int, ...]
    dtype: str
    sharding: str
    frozen: bool
    """A weight that the step leaves as it is."""


class _Placeholders:
    """Tensors without values; implements :class:`numina_finetune.xla.placement.Tensors`.

    A placeholder cannot be marked: its split is told to the compiler, as that of the step's argument.
    """

    def put(self, tensor: torch.Tensor, spec: PartitionSpec) -> torch.Tensor:
        return placeholder(tuple(tensor.shape), tensor.dtype)

    def weight(self, members: Mapping[str, nn.Parameter], spec: PartitionSpec) -> torch.Tensor:
        (like, *others) = members.values()
        return placeholder((len(members), *like.shape) if others else tuple(like.shape), like.dtype)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, spec: PartitionSpec) -> torch.Tensor:
        return placeholder(shape, dtype)


def trace(config: RunConfig, geometry: Mapping[str, Any], shape: MeshShape, rows: int) -> tuple[bytes, list[Argument]]:
    """The module of one optimizer step, and its arguments.

    Args:
        geometry: the model's ``config.json``.
        rows: of one micro-batch over all devices.
    """
    xr.use_spmd()
    # mark_sharding compares the mesh with the devices at hand; what is traced here goes to a compiler and no further.
    xr.global_runtime_device_count = lambda: shape.devices
    mesh = xs.Mesh(np.arange(shape.devices), shape.sizes, MESH_AXES)
    xs.set_global_mesh(mesh)
    tensors = _Placeholders()
    model = _model(config, geometry)
    options = step_options(config, model, shape, device_type="TPU")
    placed = place_model(model, options, mesh, shape, tensors)
    optimizer = make_optimizer(placed, config, tensors, options.platform)
    rate = placeholder((), torch.float32)
    batches = [
        {name: placeholder((rows, config.max_seq_length), torch.int32) for name in BATCH_NAMES}
        for _ in range(config.gradient_accumulation_steps)
    ]
    updated = list(_state(placed, optimizer))
    given: list[_Input] = [
        *_frozen(placed),
        *((name, "other", buffer, ()) for name, buffer in placed.module.named_buffers()),
        ("learning rate", "other", rate, ()),
        *((name, "batch", tensor, BATCH_SPEC) for batch in batches for name, tensor in batch.items()),
    ]
    inputs = [tensor.detach().clone() for _, _, tensor, _ in (*updated, *given)]
    arguments = [
        Argument(
            name,
            kind,
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            sharding_text(spec, shape),
            frozen=kind == "weights" and number >= len(updated),
        )
        for number, (name, kind, tensor, spec) in enumerate((*updated, *given))
    ]
    with named_modules(placed.module):
        micro_batches = MicroBatches(placed)
        metrics = train_step(
            *(placed, micro_batches, optimizer, batches, rate),
            max_grad_norm=config.max_grad_norm,
            gradient_noise=config.gradient_noise,
        )
    outputs = [metrics, *(_as_given(placed, tensor, spec) for _, _, tensor, spec in _state(placed, optimizer))]
    donated = {number: number + 1 for number in range(len(updated))}
    return stablehlo(inputs, outputs, [argument.sharding for argument in arguments], donated), arguments


_Input = tuple[str, str, torch.Tensor, PartitionSpec]
"""Name, kind, tensor, partition."""


def _state(placed: Placed, optimizer: torch.optim.Optimizer) -> Iterator[_Input]:
    """What a step replaces by new values."""
    for name, parameter in placed.parameters.items():
        if parameter.requires_grad:
            yield name, "weights", parameter, placed.specs[name]
    for name, parameter in placed.parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"{name}:{key}", "optimizer", value, state_spec(placed, name, key)


def _frozen(placed: Placed) -> Iterator[_Input]:
    """Weights that stay as they are."""
    for name, parameter in placed.parameters.items():
        if not parameter.requires_grad:
            yield name, "weights", parameter, placed.specs[name]


def _as_given(placed: Placed, tensor: torch.Tensor, spec: PartitionSpec) -> torch.Tensor:
    """A new value where the old one lies, whose memory it takes: left free, the compiler may split a small one."""
    return placed.constraints.mark(tensor.detach(), spec) if tensor.ndim else tensor.detach()


def _model(config: RunConfig, geometry: Mapping[str, Any]) -> PreTrainedModel:
    values = dict(geometry)
    model_config = AutoConfig.for_model(values.pop("model_type"), **values)
    model_config.use_cache = False
    dtype = (COMPUTE_DTYPES if config.lora_rank else WEIGHT_DTYPES)[config.precision]
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            model_config, dtype=dtype, attn_implementation=SEGMENT_ATTENTION
        )
        if config.lora_rank:
            add_adapters(model, config, values=False)
    return model


def main(request_path: str) -> None:
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    started = time.monotonic()
    config, mesh = RunConfig.from_mapping(request["config"]), MeshShape(**request["mesh"])
    told: dict[str, Any] = {}
    try:
        text, arguments = trace(config, request["geometry"], mesh, request["rows"])
        Path(request["module"]).write_bytes(gzip.compress(text, compresslevel=1))
        told["arguments"] = [asdict(argument) for argument in arguments]
    except ConfigError as error:  # an option that cannot be had for this model and mesh
        told["faults"] = error.problems
    told["seconds"] = time.monotonic() - started
    Path(request["arguments"]).write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
