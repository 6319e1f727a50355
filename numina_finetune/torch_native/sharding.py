"""FSDP2 on the native backend: every process holds a part of each weight, its gradient and its moments.

A layer's weights are gathered when it computes, in the type that it computes with, and let go afterwards. Accelerate
does the wrapping (``fsdp2_prepare_model``), not through ``Accelerator.prepare``: that wants an optimizer whose
parameters have values already, and ``save_state`` would then write whole models besides our shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, ParallelismConfig, fsdp2_prepare_model
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from numina_finetune import accelerate_settings
from numina_finetune.mesh import MeshShape
from numina_finetune.models.precision import COMPUTE_DTYPES, compute_dtype, widen_routers
from numina_finetune.models.stream import Wanted, Weights, progress
from numina_finetune.train.loss import CausalLoss

DECODE = "next_logits"
"""The way into `CausalLoss` that gathers weights besides its ``forward``."""


class Sharded:
    """A model split over processes, and what its wrapping is asked for between steps."""

    def __init__(self, accelerator: Accelerator, module: CausalLoss, shape: MeshShape, precision: str) -> None:
        """Split ``module``, in place; its parameters may be without values (``meta``), see :meth:`fill`."""
        widen_routers(module)
        dtype = COMPUTE_DTYPES[precision]
        layers = module.model.base_model.layers
        with _told(accelerator, shape, type(layers[0]).__name__, _policy(dtype)) as mesh:
            for name, child in module.named_modules():
                own = {compute_dtype(f"{name}.{leaf}", dtype) for leaf, _ in child.named_parameters(recurse=False)}
                if own and own != {dtype}:
                    (presented,) = own
                    fully_shard(child, mesh=mesh, mp_policy=_policy(presented))
            self.module: nn.Module = fsdp2_prepare_model(accelerator, module)
        register_fsdp_forward_method(self.module, DECODE)
        self._units = [unit for unit in self.module.modules() if isinstance(unit, FSDPModule)]
        self._layers = [layer for layer in layers if isinstance(layer, FSDPModule)]
        for unit in self._units:
            # Gradients are summed: a mean over processes would be undone by the loss's own divisor.
            unit.set_force_sum_reduction_for_comms(True)
            unit.set_gradient_divide_factor(1.0)

    def fill(self, model: PreTrainedModel, weights: Weights | None, device: torch.device) -> None:
        """Give this process's parts of parameters that have no values memory on ``device``, and their values there.

        Only these parts of the stored weights are read; the host holds one parameter's at a time.

        Args:
            weights: None leaves the values open.
        """
        empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]

        def place(tensor: torch.Tensor) -> torch.Tensor:
            return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)

        self.module._apply(place)  # type: ignore[no-untyped-call]
        if weights is None:
            return
        parts = {name: _local(model.get_parameter(name)) for name in empty}
        with progress(local for local, _ in parts.values()) as told, torch.no_grad():
            for name, (local, offsets) in parts.items():
                if not local.numel():
                    continue
                part = tuple(slice(at, at + size) for at, size in zip(offsets, local.shape, strict=True))
                target = local if local.is_cpu else torch.empty_like(local, device="cpu")
                weights.read([Wanted(name, part, target)], told)
                if target is not local:
                    local.copy_(target)

    def before_backward(self, *, last: bool) -> None:
        """Whether the next backward pass is an optimizer step's last.

        Each one gives this process its part of the gradients, since keeping whole ones would undo the split; among
        replicas the parts are exchanged once a step.
        """
        for unit in self._units:
            unit.set_requires_all_reduce(last, recurse=False)

    @contextmanager
    def gathered(self, *, kept: bool) -> Iterator[None]:
        """For forward passes without gradients, of which every process makes equally many.

        Args:
            kept: each layer's weights stay gathered from its first pass on.
        """
        self._keep_layers(kept)
        try:
            yield
        finally:
            self._keep_layers(False)
            for unit in self._units:
                unit.reshard()

    def _keep_layers(self, kept: bool) -> None:
        for layer in self._layers:
            layer.set_reshard_after_forward(not kept)


def whole_bytes(model: PreTrainedModel, precision: str) -> int:
    """Bytes of all weights in the type that they are computed with."""
    values: int = sum(parameter.numel() for parameter in model.parameters())
    return COMPUTE_DTYPES[precision].itemsize * values


@contextmanager
def _told(accelerator: Accelerator, shape: MeshShape, layer: str, policy: MixedPrecisionPolicy) -> Iterator[DeviceMesh]:
    """Accelerate knows within how to wrap a model whose layers have the class ``layer``; gives the mesh that it uses.

    Its constructor takes these only where there are GPUs, and before any model is known.
    """
    with accelerate_settings.hidden():
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=True,
            cpu_ram_efficient_loading=False,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[layer],
        )
        axes = ParallelismConfig(dp_replicate_size=shape.data, dp_shard_size=shape.fsdp)
    plugin.mixed_precision_policy = policy
    mesh = axes.get_device_mesh(accelerator.device.type)
    state = accelerator.state
    told = {"fsdp_plugin": plugin, "parallelism_config": axes, "device_mesh": mesh}
    before = {name: getattr(state, name, None) for name in told}
    try:
        for name, value in told.items():
            setattr(state, name, value)
        yield mesh[tuple(axes.fsdp_dim_names)]
    finally:
        for name, value in before.items():
            setattr(state, name, value)


def _policy(dtype: torch.dtype) -> MixedPrecisionPolicy:
    """Weights gathered in ``dtype``, gradients added up in fp32; activations are the model's own business."""
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _local(parameter: nn.Parameter) -> tuple[torch.Tensor, tuple[int, ...]]:
    """This process's part of a split parameter, and where in the parameter it begins."""
    assert isinstance(parameter, DTensor)
    _, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), tuple(offsets)
