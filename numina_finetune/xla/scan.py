"""The decoder's layers as one loop: one layer's program (or that of a group, where layers alternate), many turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from numina_finetune.models.cache import CachePass, Past
from numina_finetune.models.precision import compute_dtype
from numina_finetune.xla.constraints import Constraints
from numina_finetune.xla.loops import Loop, Tensors, placeholder
from numina_finetune.xla.remat import SavedTensors, keep_products, keeping
from numina_finetune.xla.sharding import PartitionSpec
from numina_finetune.xla.tally import count, counting


class ScannedLayers(nn.Module):
    """Stands where the model has its list of layers, and is called as its first layer would be."""

    def __init__(
        self,
        group: Sequence[nn.Module],
        weights: Mapping[str, nn.Parameter],
        specs: Mapping[str, PartitionSpec],
        used: Mapping[str, PartitionSpec],
        *,
        turns: int,
        dtype: torch.dtype,
        remat: str,
        constraints: Constraints,
    ) -> None:
        """
        Args:
            group: one turn's layers, as templates without values of their own.
            weights: ``[turns, …]`` each, by the number of the layer in the group and its name in it: ``0.mlp.…``.
            specs: partition of one turn's weight, by the same names.
            used: the same as the layers compute with it.
            dtype: what the layers compute in.
        """
        super().__init__()
        for layer in group:
            keep_products(layer)
        self._group = tuple(layer.eval() for layer in group)  # a tuple: the templates' parameters are not the model's
        self._names = list(weights)
        self._specs, self._used = ([of[name] for name in self._names] for of in (specs, used))
        self._turns, self._dtype, self._remat, self._constraints = turns, dtype, remat, constraints
        for name, weight in weights.items():
            self.register_parameter(_plain(name), weight)
        self.register_buffer("one", torch.ones(()), persistent=False)
        self._programs: dict[Any, _Program] = {}
        self.one: torch.Tensor

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: CachePass | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """``[batch, seq, hidden]`` through all layers.

        Args:
            cache: for tokens that follow others, without gradients; it is given what they add to it.
        """
        given = {"attention_mask": attention_mask, "position_embeddings": position_embeddings, **others}
        constants, rebuild = _tensors_of(given)
        constants.append(self.one)
        key = tuple((name, None if isinstance(value, torch.Tensor | tuple) else value) for name, value in given.items())
        if key not in self._programs:
            self._programs[key] = _Program(self, rebuild)
        weights = [getattr(self, _plain(name)) for name in self._names]
        if cache is not None:
            return self._programs[key].decode(hidden_states, weights, constants, cache)
        if not torch.is_grad_enabled():
            return self._programs[key].evaluate(hidden_states, weights, constants)
        output: torch.Tensor = _Scan.apply(  # type: ignore[no-untyped-call]
            self._programs[key], hidden_states, len(weights), *weights, *constants
        )
        return output

    def run(
        self, number: int, hidden: torch.Tensor, weights: Sequence[torch.Tensor], arguments: Mapping[str, Any]
    ) -> torch.Tensor:
        """One layer of a turn's group, ``weights`` being the whole group's."""
        own = {self._names[place].partition(".")[2]: weights[place] for place in self.own_weights(number)}
        hidden = torch.func.functional_call(self._group[number], own, (hidden,), dict(arguments))
        return self._constraints(hidden, "hidden")

    def own_weights(self, number: int) -> list[int]:
        """Which of the weights are those of this layer of the group."""
        return [place for place, name in enumerate(self._names) if name.startswith(f"{number}.")]

    def gathered(self, rows: Sequence[torch.Tensor], one: torch.Tensor) -> Tensors:
        """One turn's weights as it computes with them.

        Args:
            one: 1, which the compiler does not know. Else it casts the whole stacks before the loop, and their copies
                live as long as the loop does (0.9 GB a chip for Qwen3-8B on 16 chips, libtpu 0.0.21); an optimization
                barrier does not keep it from that.
        """
        found = []
        for name, row, spec, used in zip(self._names, rows, self._specs, self._used, strict=True):
            dtype = compute_dtype(name, self._dtype)
            found.append(self._constraints.gathered(row if row.dtype == dtype else row * one, spec, dtype, used))
        return found


class _Program:
    """The loops of one set of arguments."""

    def __init__(self, layers: ScannedLayers, rebuild: Callable[[Sequence[torch.Tensor]], dict[str, Any]]) -> None:
        self._layers, self._rebuild = layers, rebuild
        self._trained: tuple[bool, ...] = ()
        self._counts = False
        self._saved = [SavedTensors() for _ in layers._group] if layers._remat == "none" else []
        self._kept = [0 for _ in layers._group]
        """How many tensors each layer of the group keeps."""
        self._evaluation = Loop(self._evaluate_turn)
        self._decoding: dict[Any, Loop] = {}
        self._forward, self._backward = Loop(self._forward_turn), Loop(self._backward_turn)

    def evaluate(self, hidden: torch.Tensor, weights: Tensors, constants: Tensors) -> torch.Tensor:
        (output,), _ = self._evaluation([hidden], weights, constants, turns=self._layers._turns)
        return output

    def decode(self, hidden: torch.Tensor, weights: Tensors, constants: Tensors, cache: CachePass) -> torch.Tensor:
        """The last layer's result; the cache is only read, and the layers' own keys and values come out beside it."""
        layers, past = self._layers, cache.past
        stacked, same = list(weights), list(constants)
        if past is not None:
            stacked.append(past.entries.reshape(layers._turns, -1, *past.entries.shape[1:]))
            same += [past.first, past.slot]
        kind = past is None, cache.whole
        if kind not in self._decoding:
            self._decoding[kind] = Loop(partial(self._decode_turn, cache.over(None), past is not None))
        (output,), (added,) = self._decoding[kind]([hidden], stacked, same, turns=layers._turns)
        cache.add_all(added.flatten(0, 1))
        return output

    def forward(self, hidden: torch.Tensor, weights: Tensors, constants: Tensors) -> tuple[torch.Tensor, Tensors]:
        """The last layer's result, and what backward needs: each turn's input, and what is kept of it."""
        self._trained = tuple(weight.requires_grad for weight in weights)
        for number, saved in enumerate(self._saved):
            self._choose(number, saved, hidden, weights, constants)
        turns = self._layers._turns
        (output,), kept = self._forward([hidden], weights, constants, turns=turns)
        if self._counts:
            count(kept.pop().sum(0))
        self._backward.prepare([output], [*kept, *weights], constants, turns=turns, reverse=True)
        return output, kept

    def backward(
        self, gradient: torch.Tensor, kept: Tensors, weights: Tensors, constants: Tensors
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Gradients of the first layer's input, and of the stacked weights in the compute type."""
        (first,), found = self._backward(
            [gradient], [*kept, *weights], constants, turns=self._layers._turns, reverse=True
        )
        following = iter(found)
        return first, [next(following) if trained else None for trained in self._trained]

    def _evaluate_turn(self, carry: Tensors, rows: Tensors, constants: Tensors) -> tuple[Tensors, Tensors]:
        layers, (hidden,) = self._layers, carry
        weights, arguments = layers.gathered(rows, constants[-1]), self._rebuild(constants)
        for number in range(len(layers._group)):
            hidden = layers.run(number, hidden, weights, arguments)
        return [hidden], []

    def _decode_turn(
        self, like: CachePass, has_past: bool, carry: Tensors, rows: Tensors, constants: Tensors
    ) -> tuple[Tensors, Tensors]:
        layers, (hidden,), past = self._layers, carry, None
        if has_past:
            *rows, entries = rows
            *constants, first, slot = constants
            past = Past(entries, first, slot)
        cache, hidden = like.over(past), layers._constraints.place(hidden, "hidden")
        weights, arguments = layers.gathered(rows, constants[-1]), self._rebuild(constants) | {"cache": cache}
        for number in range(len(layers._group)):
            hidden = layers.run(number, hidden, weights, arguments)
        return [hidden], [cache.added]

    def _forward_turn(self, carry: Tensors, rows: Tensors, constants: Tensors) -> tuple[Tensors, Tensors]:
        hidden, leaves, arguments = carry[0], self._leaves(rows, constants[-1]), self._rebuild(constants)
        everything: Tensors = []
        with counting() as counted:
            for number in range(len(self._layers._group)):
                hidden, kept = self._forward_layer(number, hidden.detach(), leaves, arguments)
                self._kept[number] = len(kept)
                everything += kept
        self._counts = bool(counted)
        totals = [torch.stack(counted).sum(0)] if counted else []
        return [hidden], [*everything, *totals]

    def _forward_layer(
        self, number: int, hidden: torch.Tensor, leaves: Tensors, arguments: Mapping[str, Any]
    ) -> tuple[torch.Tensor, Tensors]:
        """A layer's result, and what is kept of it: its input first."""
        layers, source = self._layers, hidden.requires_grad_()
        kept: Tensors = []
        if self._saved:
            with torch.set_grad_enabled(True):
                output, kept = self._saved[number].forward(lambda: layers.run(number, source, leaves, arguments))
        elif layers._remat == "dots":
            with torch.set_grad_enabled(True), keeping(None) as kept:
                output = layers.run(number, source, leaves, arguments)
        else:
            output = layers.run(number, source.detach(), leaves, arguments)
        return output.detach(), [source.detach(), *kept]

    def _backward_turn(self, carry: Tensors, rows: Tensors, constants: Tensors) -> tuple[Tensors, Tensors]:
        """Layer by layer from the last one: each is computed again from its own input, and no other with it."""
        layers = self._layers
        kept, weights = rows[: -len(layers._names)], rows[-len(layers._names) :]
        leaves, arguments, gradient = self._leaves(weights, constants[-1]), self._rebuild(constants), carry[0]
        found: dict[int, torch.Tensor] = {}
        for number in reversed(range(len(layers._group))):
            first = sum(self._kept[:number])
            own = kept[first : first + self._kept[number]]
            trained = [place for place in layers.own_weights(number) if self._trained[place]]
            gradient, by_weight = self._backward_layer(number, gradient, own, leaves, trained, arguments)
            # Split at once, turn by turn: a whole layer's gradient never exists for longer than its turn.
            for place, own_gradient in zip(trained, by_weight, strict=True):
                found[place] = layers._constraints.mark(own_gradient, layers._specs[place])
        return [gradient], [found[place] for place in sorted(found)]

    def _backward_layer(
        self,
        number: int,
        gradient: torch.Tensor,
        kept: Tensors,
        leaves: Tensors,
        trained: Sequence[int],
        arguments: Mapping[str, Any],
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Gradients of a layer's input, and of its trained weights."""
        layers = self._layers
        hidden = layers._constraints.place(kept[0], "hidden").detach().requires_grad_()
        given: AbstractContextManager[Any] = nullcontext()
        if self._saved:
            given = self._saved[number].given(kept[1:])
        elif layers._remat == "dots":
            given = keeping(kept[1:])
        with torch.set_grad_enabled(True), given:
            output = layers.run(number, hidden, leaves, arguments)
        first, *others = torch.autograd.grad(output, [hidden, *(leaves[place] for place in trained)], gradient)
        return layers._constraints.place(first, "hidden"), others

    def _leaves(self, rows: Sequence[torch.Tensor], one: torch.Tensor) -> Tensors:
        gathered = self._layers.gathered(rows, one)
        return [
            weight.detach().requires_grad_(trained) for weight, trained in zip(gathered, self._trained, strict=True)
        ]

    def _choose(
        self, number: int, saved: SavedTensors, hidden: torch.Tensor, weights: Tensors, constants: Tensors
    ) -> None:
        """Find out on a copy of the layer what backward needs of what depends on the layer's input."""
        if saved.chosen:
            return
        inputs = [placeholder(hidden.shape, hidden.dtype)]
        inputs += [placeholder(weight.shape[1:], weight.dtype) for weight in weights]
        inputs += [placeholder(tensor.shape, tensor.dtype) for tensor in constants]
        with torch.no_grad():
            source, *others = [tensor * 1 for tensor in inputs]
            same = others[len(weights) :]
            leaves = self._leaves(others[: len(weights)], same[-1])
        source.requires_grad_()
        with torch.set_grad_enabled(True):
            saved.choose(lambda: self._layers.run(number, source, leaves, self._rebuild(same)), inputs)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, program: _Program, hidden: torch.Tensor, count: int, *tensors: torch.Tensor) -> torch.Tensor:
        weights, constants = list(tensors[:count]), list(tensors[count:])
        output, kept = program.forward(hidden, weights, constants)
        ctx.program, ctx.count, ctx.kept = program, count, len(kept)
        ctx.save_for_backward(*kept, *tensors)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        kept, weights = saved[: ctx.kept], saved[ctx.kept : ctx.kept + ctx.count]
        constants = saved[ctx.kept + ctx.count :]
        first, found = ctx.program.backward(gradients[0], kept, weights, constants)
        return None, first, None, *found, *(None for _ in constants)


def _plain(name: str) -> str:
    """A parameter's own name may not have dots."""
    return name.replace(".", "/")


def _tensors_of(
    arguments: Mapping[str, Any],
) -> tuple[Tensors, Callable[[Sequence[torch.Tensor]], dict[str, Any]]]:
    """The tensors among ``arguments``, alone or in tuples, and the way to put others in their places."""
    found: Tensors = []
    shape: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            shape[name] = len(found)
            found.append(value)
        elif isinstance(value, tuple):
            shape[name] = tuple(range(len(found), len(found) + len(value)))
            found += value
    plain = {name: value for name, value in arguments.items() if name not in shape}

    def rebuild(tensors: Sequence[torch.Tensor]) -> dict[str, Any]:
        placed = {
            name: tuple(tensors[number] for number in place) if isinstance(place, tuple) else tensors[place]
            for name, place in shape.items()
        }
        return {**plain, **placed}

    return found, rebuild
