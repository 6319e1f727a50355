"""The micro-batches of an optimizer step as a loop of the program, compiled once however many there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from numina_finetune.config import BATCH_AXES
from numina_finetune.train.backend import DeviceBatch
from numina_finetune.xla.loops import Loop, Tensors
from numina_finetune.xla.placement import Placed
from numina_finetune.xla.sharding import PartitionSpec
from numina_finetune.xla.tally import counting


@dataclass(frozen=True)
class _Trained:
    """A parameter by its name in the module that holds it."""

    name: str
    parameter: nn.Parameter
    spec: PartitionSpec


class MicroBatches:
    """Forward and backward of one or many micro-batches; made once for a model, for it keeps the lowered loop."""

    def __init__(self, placed: Placed) -> None:
        specs = {id(parameter): placed.specs[name] for name, parameter in placed.parameters.items()}
        self._both_ways, self._constraints = _BothWays(placed.module), placed.constraints
        self._trained: list[_Trained] = []
        self._others: dict[str, torch.Tensor] = dict(self._both_ways.named_buffers())
        for name, parameter in self._both_ways.named_parameters():
            if parameter.requires_grad:
                self._trained.append(_Trained(name, parameter, specs[id(parameter)]))
            else:
                self._others[name] = parameter
        self._batch_names: tuple[str, ...] = ()
        self._loop = Loop(self._turn)

    def backward(self, batches: Sequence[DeviceBatch], scale: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        """Take the gradients of the loss, summed over the batches, times ``scale``, into the parameters' ``grad``.

        Returns:
            The summed loss, and what the layers counted (see :mod:`.tally`).
        """
        if len(batches) == 1:
            loss, counted = self._both_ways(batches[0], scale)
            return loss, counted
        self._batch_names = tuple(batches[0])
        rows = [torch.stack([batch[name] for batch in batches]) for name in self._batch_names]
        with torch.no_grad():
            sums = [torch.zeros((), dtype=torch.float32, device=scale.device)]
            sums += [
                self._constraints.mark(torch.zeros_like(each.parameter, requires_grad=False), each.spec)
                for each in self._trained
            ]
            (total, *gradients), counts = self._loop(
                sums,
                [self._constraints.mark(row, (None, BATCH_AXES, None)) for row in rows],
                [scale, *(each.parameter for each in self._trained), *self._others.values()],
                turns=len(batches),
            )
        for each, gradient in zip(self._trained, gradients, strict=True):
            each.parameter.grad = gradient
        return total, [count.sum(0) for count in counts]

    def _turn(self, carry: Tensors, rows: Tensors, constants: Tensors) -> tuple[Tensors, Tensors]:
        """One micro-batch: its loss and gradients on top of those of the ones before it."""
        (total, *sums), (scale, *values) = carry, constants
        leaves = [value.detach().requires_grad_() for value in values[: len(self._trained)]]
        held = dict(zip((each.name for each in self._trained), leaves, strict=True))
        held |= zip(self._others, values[len(self._trained) :], strict=True)
        batch = dict(zip(self._batch_names, rows, strict=True))
        loss, counted = torch.func.functional_call(self._both_ways, held, (batch, scale))
        grown = [
            self._constraints.mark(before if leaf.grad is None else before + leaf.grad, each.spec)
            for before, leaf, each in zip(sums, leaves, self._trained, strict=True)
        ]
        return [total + loss, *grown], [torch.stack(counted).sum(0)] if counted else []


class _BothWays(nn.Module):
    """A module's loss and its gradients in one call: what is computed again on the way back must see the same tensors
    in the parameters' places as the way forward did.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: DeviceBatch, scale: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        """The loss, whose gradients times ``scale`` are in the parameters' ``grad``, and what the layers counted."""
        with torch.set_grad_enabled(True):
            # Not around the backward pass as well: what is computed again there would be counted again.
            with counting() as counted:
                loss: torch.Tensor = self.module(**batch)
            torch.autograd.backward(loss * scale)
        return loss.detach(), counted
