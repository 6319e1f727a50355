"""A model's weights, read one at a time, wherever they lie; what an export writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Protocol

import torch
from torch import nn

from numina_finetune.checkpoint.shards import ShardReader
from numina_finetune.models.lora import adapters_by_weight, merged
from numina_finetune.models.stream import Wanted, Weights, whole

_MODEL = "model."
"""Where a checkpoint keeps the weights; the optimizer lies beside it."""


class NamedWeights(Protocol):
    """Weights by Hugging Face name."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of all of them; a tied one stands once."""

    def read(self, name: str) -> torch.Tensor:
        """One whole weight, on the CPU."""


class CheckpointWeights:
    """What was trained, out of a checkpoint: all weights, or adapters alone."""

    def __init__(self, shards: ShardReader) -> None:
        self._shards = shards
        found = sorted((name, shape) for name, (shape, _) in shards.tensors.items() if name.startswith(_MODEL))
        self.shapes = {name.removeprefix(_MODEL): shape for name, shape in found}

    def read(self, name: str) -> torch.Tensor:
        """One whole weight.

        Raises:
            Damaged: its bytes are not what was written.
        """
        return self._shards.read(_MODEL + name)


class ModelWeights:
    """Those of a model on the CPU."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._parameters[name]


class StreamedWeights:
    """Those of a model without values, out of its files."""

    def __init__(self, model: nn.Module, source: Weights) -> None:
        """
        Args:
            source: of the model's weights; they are cast to the type that its parameters have.
        """
        self._source = source
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        self.shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}

    def read(self, name: str) -> torch.Tensor:
        """One whole weight.

        Raises:
            ConfigError: it is not there, whole.
        """
        values = torch.empty(self.shapes[name], dtype=self._dtypes[name])
        self._source.read([Wanted(name, whole(values.shape), values)])
        return values


class MergedWeights:
    """Frozen weights with what adapters add to them; no more than one weight is in memory besides what is read."""

    def __init__(self, base: NamedWeights, adapters: NamedWeights, scale: float, dtype: torch.dtype) -> None:
        """
        Args:
            dtype: of the merged weights; the sums are made in fp32.
        """
        self._base, self._adapters, self._scale, self._dtype = base, adapters, scale, dtype
        self._names = adapters_by_weight(adapters.shapes)
        self.shapes = base.shapes

    def read(self, name: str) -> torch.Tensor:
        weight, own = self._base.read(name), self._names.get(name)
        if own is None:
            return weight
        return merged(weight, self._adapters.read(own["A"]), self._adapters.read(own["B"]), self._scale, self._dtype)


class WeightParts:
    """Named weights as a source of any part of them; implements `numina_finetune.models.stream.Weights`.

    One whole weight is in memory at a time.
    """

    def __init__(self, named: NamedWeights) -> None:
        self._named = named

    def read(self, wanted: Sequence[Wanted], told: Callable[[int], object] = lambda count: None) -> None:
        """Fill the targets."""
        for name, parts in groupby(sorted(wanted, key=lambda one: one.name), key=lambda one: one.name):
            values = self._named.read(name)
            for one in parts:
                one.target.copy_(values[one.part])
                told(one.target.nbytes)
