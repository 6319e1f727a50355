"""What a layer keeps from its forward pass for the backward one, and what it computes again.

``none`` keeps all that backward needs; ``dots`` the results of matrix products and of the attention kernel;
``full`` nothing but the layer's input. Attention's own code and the linear layers call :func:`keep` on what may be
kept; in the backward pass, where the layer is traced again, the same call gives what was kept, and XLA drops
whatever only that value needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch_xla
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch_xla.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

_current: _Kept | None = None


class _Kept:
    """The values that one tracing of a layer keeps, or is given."""

    def __init__(self, given: Sequence[torch.Tensor] | None) -> None:
        self.given = given
        self.values: list[torch.Tensor] = []

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        self.values.append(value.detach())
        if self.given is None:
            return value
        kept = self.given[len(self.values) - 1]
        if not (torch.is_grad_enabled() and value.requires_grad):
            return kept
        replaced: torch.Tensor = _Replace.apply(value, kept)  # type: ignore[no-untyped-call]
        return replaced


class _Replace(torch.autograd.Function):
    """The second value with the first one's place in the graph."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        return kept.view_as(kept)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        return gradients[0], None


def keep(value: torch.Tensor) -> torch.Tensor:
    """``value``, or what was kept of it in the forward pass."""
    return value if _current is None else _current(value)


@contextmanager
def keeping(given: Sequence[torch.Tensor] | None) -> Iterator[list[torch.Tensor]]:
    """Collects what :func:`keep` sees; with ``given``, answers it with these values in the same order."""
    global _current
    before, _current = _current, _Kept(given)
    try:
        yield _current.values
    finally:
        _current = before


def keep_products(layer: nn.Module) -> None:
    """Let :func:`keep` see the results of all linear layers of ``layer``."""
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, arguments, output: keep(output))


class SavedTensors:
    """All that autograd saves in a layer's forward pass, for the policy ``none``.

    What comes from the weights alone (their transposes, their casts) is made again: kept, it would be a second copy
    of them for each layer.
    """

    def __init__(self) -> None:
        self.chosen: dict[int, int] = {}
        """From the number of a save to that of the kept value; several may be the same value."""

    def choose(self, run: Callable[[], torch.Tensor], inputs: Sequence[torch.Tensor]) -> None:
        """Find what is to be kept of what ``run()`` saves.

        Args:
            inputs: the placeholders that all of it is made from; the first one stands for the layer's input.
        """
        saved: list[torch.Tensor] = []
        bases: list[int] = []
        with _saving_into(saved, bases):
            output = run()
        kept: dict[Any, int] = {}
        for number, (tensor, base) in enumerate(zip(saved, bases, strict=True)):
            context = torch_xla._XLAC.lowering.LoweringContext("Saved")
            context.build([tensor * 1])
            places = tuple(context.tensor_parameter_id(tensor) for tensor in inputs)
            if places[0] != -1:
                # Linear layers of one input save it each in its own view: the same program over the same tensor.
                self.chosen[number] = kept.setdefault((base, context.hlo_text(), places), len(kept))
        del output  # until here it kept alive what the numbers in `bases` point at

    def forward(self, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """``run()``, and what is kept of it."""
        saved: list[torch.Tensor] = []
        with _saving_into(saved):
            output = run()
        kept = {place: saved[number] for number, place in self.chosen.items()}
        return output, [kept[place] for place in range(len(kept))]

    @contextmanager
    def given(self, values: Sequence[torch.Tensor]) -> Iterator[None]:
        """Autograd finds ``values`` where it saved them."""
        saved: list[torch.Tensor] = []

        def pack(tensor: torch.Tensor) -> int:
            saved.append(tensor)
            return len(saved) - 1

        def unpack(number: int) -> torch.Tensor:
            return values[self.chosen[number]] if number in self.chosen else saved[number]

        with saved_tensors_hooks(pack, unpack):
            yield


def _saving_into(saved: list[torch.Tensor], bases: list[int] | None = None) -> saved_tensors_hooks:
    def pack(tensor: torch.Tensor) -> int:
        saved.append(tensor.detach())
        if bases is not None:
            bases.append(tensor._cdata if tensor._base is None else tensor._base._cdata)
        return len(saved) - 1

    return saved_tensors_hooks(pack, saved.__getitem__)


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Recompute each decoder layer in the backward pass, where the layers stand one after another in the program.

    transformers' ``gradient_checkpointing_enable`` ends in ``torch.utils.checkpoint``, which looks for ``torch.xla``
    and fails; torch_xla's own function adds the optimization barriers without which XLA merges the recomputation away.
    """
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = _checkpoint


def _checkpoint(function: Any, hidden: torch.Tensor, *arguments: Any) -> Any:
    # The weights of a reentrant checkpoint have no gradients where its input has none, as behind a frozen embedding.
    given = hidden if hidden.requires_grad or not torch.is_grad_enabled() else hidden.detach().requires_grad_()
    return checkpoint(function, given, *arguments, use_reentrant=True)
