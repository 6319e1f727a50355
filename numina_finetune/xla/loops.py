"""A counted loop in the XLA program: its body is traced, lowered and compiled once, however often it turns.

Torch_xla has such a loop in ``torch_xla.experimental.scan``, built on AOTAutograd. This one differs in what a
training step needs: values that stay the same in every turn (positions, segment ids, weights) are handed in once
instead of being carried and saved turn by turn; bodies are plain functions that may use autograd inside themselves;
and a lowered body is kept, so that from the second step on it costs no tracing at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_xla
import torch_xla.core.xla_builder as xb

from numina_finetune.xla.tally import counting

Tensors = list[torch.Tensor]
Body = Callable[[Tensors, Tensors, Tensors], tuple[Tensors, Tensors]]
"""``(carry, slices, constants) -> (new carry, outputs)``, all plain tensors; it must always do the same."""


@dataclass(frozen=True)
class _Lowered:
    """A body as an XLA computation."""

    computation: Any
    parameters: tuple[int, ...]
    """For each parameter of the computation in turn, which of the loop's values it is."""
    captured: tuple[torch.Tensor, ...]
    """Device values that the body made itself, such as Python numbers; they follow the arguments."""
    outputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    """Shape and type of what each turn gives."""


class Loop:
    """``body`` once for each row of the stacked tensors."""

    def __init__(self, body: Body) -> None:
        self._body = body
        self._kept: dict[Any, tuple[_Lowered, Any]] = {}

    def __call__(
        self,
        carry: Sequence[torch.Tensor],
        stacked: Sequence[torch.Tensor],
        constants: Sequence[torch.Tensor] = (),
        *,
        turns: int,
        reverse: bool = False,
    ) -> tuple[Tensors, Tensors]:
        """Run the loop.

        Args:
            carry: goes from turn to turn; types and shapes stay.
            stacked: ``[turns, …]``; a turn sees its row.
            constants: the same in every turn.
            reverse: from the last row to the first.

        Returns:
            The last carry, and the outputs of all turns, ``[turns, …]``.
        """
        arguments = [*carry, *stacked, *constants]
        lowered, computation = self.prepare(carry, stacked, constants, turns=turns, reverse=reverse)
        with torch.no_grad():
            device = arguments[0].device
            values = [torch.zeros((), dtype=torch.int64, device=device), *arguments]
            values += [torch.zeros((turns, *shape), dtype=dtype, device=device) for shape, dtype in lowered.outputs]
            values += lowered.captured
            results = torch_xla._XLAC._xla_user_computation("numina::loop", tuple(values), computation)
        first = 1 + len(arguments)
        return list(results[1 : 1 + len(carry)]), list(results[first : first + len(lowered.outputs)])

    def prepare(
        self,
        carry: Sequence[torch.Tensor],
        stacked: Sequence[torch.Tensor],
        constants: Sequence[torch.Tensor] = (),
        *,
        turns: int,
        reverse: bool = False,
    ) -> tuple[_Lowered, Any]:
        """Trace and lower the loop for arguments such as these, without running it.

        A body that takes gradients is prepared in the forward pass: the backward one would begin another in itself.
        """
        kinds = [(tuple(tensor.shape), tensor.dtype) for tensor in (*carry, *stacked, *constants)]
        key = turns, reverse, len(carry), len(stacked), tuple(kinds)
        if key not in self._kept:
            with torch.no_grad():
                lowered = self._lower(carry, stacked, constants)
                self._kept[key] = lowered, _while(lowered, carry, stacked, constants, turns, reverse)
        return self._kept[key]

    def _lower(
        self, carry: Sequence[torch.Tensor], stacked: Sequence[torch.Tensor], constants: Sequence[torch.Tensor]
    ) -> _Lowered:
        rows = [placeholder(tensor.shape[1:], tensor.dtype) for tensor in stacked]
        inputs = [*map(_like, carry), *rows, *map(_like, constants)]
        # A sharding mark replaces the data under a tensor that holds data, and the loop's argument would be lost
        # (https://github.com/pytorch/xla/issues/8742); the result of an operation is marked in place. XLA drops "* 1".
        shown = [tensor if tensor.dtype == torch.bool else tensor * 1 for tensor in inputs]
        carried, given = len(carry), len(carry) + len(stacked)
        with counting():
            new_carry, outputs = self._body(shown[:carried], shown[carried:given], shown[given:])
        shapes = [tuple(tensor.shape) for tensor in carry], [tuple(tensor.shape) for tensor in new_carry]
        assert shapes[0] == shapes[1], f"the carry changes from {shapes[0]} to {shapes[1]}"
        context = torch_xla._XLAC.lowering.LoweringContext("LoopBody")
        # an output that is an input, or another output, as it stands would have no place of its own
        context.build([tensor * 1 for tensor in (*new_carry, *outputs)])
        computation = xb.computation_from_module_proto("loop_body", context.hlo())
        place = {context.tensor_parameter_id(tensor): 1 + number for number, tensor in enumerate(inputs)}
        place.pop(-1, None)  # not used by the body
        captured: Tensors = []
        for parameter, tensor in sorted(context.device_parameter_id_tensor_mapping().items()):
            if parameter not in place:
                place[parameter] = 1 + len(inputs) + len(outputs) + len(captured)
                captured.append(tensor.to(torch_xla.device()))
        return _Lowered(
            computation,
            tuple(place[number] for number in range(len(place))),
            tuple(captured),
            tuple((tuple(tensor.shape), tensor.dtype) for tensor in outputs),
        )


def placeholder(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor on the device that has no value."""
    tensor: torch.Tensor = xb.create_placeholder_tensor(tuple(shape), dtype)
    return tensor


def _like(tensor: torch.Tensor) -> torch.Tensor:
    return placeholder(tensor.shape, tensor.dtype)


def _while(
    lowered: _Lowered,
    carry: Sequence[torch.Tensor],
    stacked: Sequence[torch.Tensor],
    constants: Sequence[torch.Tensor],
    turns: int,
    reverse: bool,
) -> Any:
    """The loop as one computation over (turn, carry, stacked, constants, outputs, captured)."""
    builder = xb.create_builder("loop")
    shapes: list[tuple[torch.dtype, tuple[int, ...]]] = [(torch.int64, ())]
    shapes += [(tensor.dtype, tuple(tensor.shape)) for tensor in (*carry, *stacked, *constants)]
    shapes += [(dtype, (turns, *shape)) for shape, dtype in lowered.outputs]
    shapes += [(tensor.dtype, tuple(tensor.shape)) for tensor in lowered.captured]
    parameters = [
        xb.mkparam(builder, number, xb.mkshape(xb.Op.from_torch_type(dtype), shape))
        for number, (dtype, shape) in enumerate(shapes)
    ]
    first_row = 1 + len(carry)
    rows = range(first_row, first_row + len(stacked))
    first_output = first_row + len(stacked) + len(constants)

    def condition(turn: xb.Op, *_: xb.Op) -> xb.Op:
        return turn < xb.Op.scalar(turn.builder(), turns, dtype=xb.Type.S64)

    def body(turn: xb.Op, *others: xb.Op) -> tuple[xb.Op, ...]:
        values = [turn, *others]
        row = xb.Op.scalar(turn.builder(), turns - 1, dtype=xb.Type.S64) - turn if reverse else turn
        given = [_row_of(value, row) if number in rows else value for number, value in enumerate(values)]
        result = xb.Op.call(lowered.computation, [given[number] for number in lowered.parameters])
        for number in range(len(carry)):
            values[1 + number] = result.get_tuple_element(number)
        for number in range(len(lowered.outputs)):
            output = result.get_tuple_element(len(carry) + number)
            into = values[first_output + number]
            values[first_output + number] = into.dynamic_update_slice(output.broadcast([1]), _indices(into, row))
        values[0] = turn + xb.Op.scalar(turn.builder(), 1, dtype=xb.Type.S64)
        return tuple(values)

    return xb.Op.mkwhile(parameters, condition, body).build("loop")


def _row_of(value: xb.Op, row: xb.Op) -> xb.Op:
    sizes = list(value.shape().sizes)
    return value.dynamic_slice(_indices(value, row), [1, *sizes[1:]]).reshape(sizes[1:])


def _indices(value: xb.Op, row: xb.Op) -> list[xb.Op]:
    return [row, *(row.zeros_like() for _ in value.shape().sizes[1:])]
