"""SPMD mode, the device mesh, and what the run cost in compilations and host reads."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch_xla.debug.metrics as xla_metrics
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr

from numina_finetune.config import BATCH_AXES, MESH_AXES
from numina_finetune.errors import ConfigError
from numina_finetune.mesh import MeshShape, parse_mesh
from numina_finetune.tpu import this_machines_chip

logger = logging.getLogger(__name__)

BATCH_SPEC = (BATCH_AXES, None)
"""Partition of a ``[batch, seq]`` tensor: rows over the data-parallel axes."""


def start_spmd() -> int:
    """Enter SPMD mode, one process a host, and return the number of devices of all hosts.

    Raises:
        ConfigError: the environment asks for what cannot be trained under.
    """
    faults = [
        f"{name}={os.environ[name]} turns every float into bfloat16, master weights too: unset it and use --precision"
        for name in ("XLA_USE_BF16", "XLA_DOWNCAST_BF16")
        if os.environ.get(name, "0") not in ("", "0")
    ]
    if faults:
        raise ConfigError(faults)
    xr.use_spmd()
    return int(xr.global_runtime_device_count())


def build_mesh(text: str | None, devices: int) -> tuple[xs.Mesh, MeshShape]:
    """The mesh of ``--mesh`` over all devices, also made the global one.

    Raises:
        ConfigError: see :func:`numina_finetune.mesh.parse_mesh`; or an axis that must stay inside a host does not.
    """
    shape = parse_mesh(text, devices)
    local = devices // int(xr.process_count())
    if local % shape.tensor:
        raise ConfigError(
            f"--mesh {text!r}: tensor={shape.tensor} devices do not fit into a host's {local}: "
            "make it divide them, so that a host's rows stay its own"
        )
    if shape.dcn > 1 and xr.device_type() == "TPU":
        # Slices know their place in the network; HybridMesh orders the devices by it.
        mesh: xs.Mesh = xs.HybridMesh(
            ici_mesh_shape=(1, *shape.sizes[1:]), dcn_mesh_shape=(shape.dcn, 1, 1, 1, 1), axis_names=MESH_AXES
        )
    else:
        mesh = xs.Mesh(np.arange(devices), shape.sizes, MESH_AXES)
    xs.set_global_mesh(mesh)
    return mesh, shape


def peak_flops() -> float | None:
    """A chip's bf16 FLOPs a second; None where it is no TPU, or one that is not in the table.

    torch_xla's own way to a chip's name is a request to the metadata service without a time limit.
    """
    if xr.device_type() != "TPU":
        return None
    named = os.environ.get("TPU_ACCELERATOR_TYPE")
    chip = this_machines_chip(named)
    if chip is None:
        logger.warning("this TPU (%s) is not in the table of chips: utilisation is not reported", named or "unnamed")
    return chip.bf16_flops if chip else None


def compile_seconds() -> float:
    """What this process has spent on programs: compiling them, or reading kept ones back."""
    data = xla_metrics.metric_data("CompileTime")
    return data[1] / 1e9 if data else 0.0


class TrafficCounter:
    """Counts graph compilations and host reads of the training steps, and of all that happens between them.

    A host read is a transfer from a device, or an ``.item()`` (``_local_scalar_dense``): both stall the device.
    """

    def __init__(self) -> None:
        self.training_compilations = 0
        self.host_reads = 0
        self.fallbacks = 0
        """Operators that XLA does not have, and that ran on the host instead."""
        self.generation_compilations = 0
        self._compilations_so_far = self._reads_so_far = self._fallbacks_so_far = 0

    def count_step(self) -> None:
        """A step ends: what came since the last step, or since :meth:`leave_out`, belongs to training."""
        self.training_compilations += _samples("CompileTime") - self._compilations_so_far
        self.host_reads += _host_reads() - self._reads_so_far
        self.fallbacks += _fallbacks() - self._fallbacks_so_far
        self.leave_out()

    @contextmanager
    def generating(self) -> Iterator[None]:
        """What happens within is generation, and none of training's."""
        before = _samples("CompileTime")
        yield
        self.generation_compilations += _samples("CompileTime") - before
        self.leave_out()

    def leave_out(self) -> None:
        """What came since the last step was asked for: a log line, a save, an evaluation."""
        self._compilations_so_far, self._reads_so_far = _samples("CompileTime"), _host_reads()
        self._fallbacks_so_far = _fallbacks()


def _samples(metric: str) -> int:
    data = xla_metrics.metric_data(metric)
    return int(data[0]) if data else 0


def _host_reads() -> int:
    return _samples("TransferFromDeviceTime") + int(xla_metrics.counter_value("aten::_local_scalar_dense") or 0)


def _fallbacks() -> int:
    names = (name for name in xla_metrics.counter_names() if name.startswith("aten::"))
    return sum(int(xla_metrics.counter_value(name) or 0) for name in names if name != "aten::_local_scalar_dense")
