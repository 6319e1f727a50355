"""Tensors on the devices, made shard by shard: no host ever has more of one than its own devices hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch_xla
import torch_xla.distributed.spmd as xs
from torch import nn

from numina_finetune.models.ranges import Part
from numina_finetune.models.stream import Wanted, Weights
from numina_finetune.xla.sharding import PartitionSpec


@dataclass(frozen=True)
class RuntimeTensors:
    """Tensors with values, on the devices at hand; implements :class:`numina_finetune.xla.placement.Tensors`."""

    mesh: xs.Mesh
    device: torch.device
    weights: Weights | None = None
    """The values of parameters that have none; None leaves those at zero, for a checkpoint to fill."""
    told: Callable[[int], object] = lambda count: None
    """Is called with the bytes of the parameters that have come to the devices, as they come."""

    def put(self, tensor: torch.Tensor, spec: PartitionSpec) -> torch.Tensor:
        moved = tensor.to(self.device)
        xs.mark_sharding(moved, self.mesh, spec)
        return moved

    def weight(self, members: Mapping[str, nn.Parameter], spec: PartitionSpec) -> torch.Tensor:
        """See `Tensors`. On the host is no more of it than its own devices' shards, and each of those once."""
        (like, *others) = members.values()
        shape = (len(members), *like.shape) if others else tuple(like.shape)
        if like.is_meta and self.weights is None:
            found = self.zeros(shape, like.dtype, spec)
        else:
            found = self._split(members, shape, like.dtype, spec)
        self.told(like.nbytes * len(members))
        return found

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, spec: PartitionSpec) -> torch.Tensor:
        zeros = torch.zeros(shape, dtype=dtype, device=self.device)
        if spec:
            xs.mark_sharding(zeros, self.mesh, spec)
        return zeros

    def _split(
        self, members: Mapping[str, nn.Parameter], shape: tuple[int, ...], dtype: torch.dtype, spec: PartitionSpec
    ) -> torch.Tensor:
        held = local_parts(self.mesh, self.device, spec, shape)
        shards = {_key(part): torch.empty([one.stop - one.start for one in part], dtype=dtype) for _, part in held}
        self._read(members, {_key(part): part for _, part in held}, shards)
        if len(shards) == 1 and tuple(next(iter(shards.values())).shape) == shape:
            return self.put(next(iter(shards.values())), spec)
        # Never executed: it gives the shards below a shape and a split.
        frame = torch.empty(shape, dtype=dtype, device=self.device)
        xs.mark_sharding(frame, self.mesh, spec)
        torch_xla._XLAC._load_local_shards(
            frame, [shards[_key(part)] for _, part in held], [device for device, _ in held]
        )
        return frame

    def _read(
        self,
        members: Mapping[str, nn.Parameter],
        parts: Mapping[_Key, Part],
        shards: Mapping[_Key, torch.Tensor],
    ) -> None:
        """Fill ``shards``, which are the parts of the members' stack."""
        wanted = []
        for number, (name, parameter) in enumerate(members.items()):
            for key, part in parts.items():
                row = shards[key] if len(members) == 1 else shards[key][number]
                own = part if len(members) == 1 else part[1:]
                if parameter.is_meta:
                    wanted.append(Wanted(name, own, row))
                else:
                    row.copy_(parameter.detach()[own])
        if wanted and self.weights is not None:
            self.weights.read(wanted)


_Key = tuple[tuple[int, int], ...]
"""A part, as a key."""


def _key(part: Part) -> _Key:
    return tuple((one.start, one.stop) for one in part)


def local_parts(
    mesh: xs.Mesh, device: torch.device, spec: PartitionSpec, shape: tuple[int, ...]
) -> list[tuple[str, Part]]:
    """Which part of a tensor of ``shape``, split by ``spec``, each of this process's devices holds.

    The runtime is asked, by way of a tensor that has one value for each part: it alone knows where its devices stand
    in a mesh over several hosts.
    """
    sizes = mesh.shape()
    axes = [(axis,) if isinstance(axis, str) else axis or () for axis in spec]
    counts = [math.prod(sizes[name] for name in along) for along in axes]
    probe = torch.zeros(counts).to(device)
    xs.mark_sharding(probe, mesh, spec)
    (shards,) = torch_xla._XLAC._get_local_shards([probe])
    (places,) = torch_xla._XLAC._get_local_shard_replica_and_indices([probe])
    found = []
    for (_, name), (_, place) in zip(shards, places, strict=True):
        numbers = [0] * len(shape) if place is Ellipsis else [one.start for one in place]
        steps = [size // count for size, count in zip(shape, counts, strict=True)]
        part = tuple(slice(number * step, (number + 1) * step) for number, step in zip(numbers, steps, strict=True))
        found.append((str(name), part))
    return found
