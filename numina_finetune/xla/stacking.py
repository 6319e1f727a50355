"""The weights of equal layers as one tensor each, ``[layers, …]``, and the way to their own names and back.

In memory a scanned model has one parameter where Hugging Face's has one for each layer. On disk there are always the
latter; only names and offsets differ, so that nothing is copied on the way.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from numina_finetune.checkpoint.layout import Stored
from numina_finetune.checkpoint.shards import Shard

_LAYER = re.compile(r"^(?P<before>.*\blayers\.)(?P<number>\d+)(?P<after>\..+)$")


@dataclass(frozen=True)
class Stacking:
    """``turns`` groups of ``period`` layers; layers of the same place in their group are stacked."""

    period: int
    turns: int

    def stacked_name(self, name: str) -> str:
        """Of the tensor that holds the parameter ``name``: itself, or such as ``model.layers.[0::2].mlp…``."""
        match = _LAYER.match(name)
        if match is None:
            return name
        return f"{match['before']}[{int(match['number']) % self.period}::{self.period}]{match['after']}"

    def members(self, stacked: str) -> list[str]:
        """The layers' own names for a stacked one; the name alone where it is none."""
        first = f"::{self.period}]"
        if first not in stacked:
            return [stacked]
        before, after = stacked.split(first, 1)
        head, _, place = before.rpartition("[")
        return [f"{head}{int(place) + turn * self.period}{after}" for turn in range(self.turns)]

    def unstack(self, shard: Shard) -> list[Shard]:
        """The layers' own pieces in a piece of a stacked tensor; they share its memory."""
        piece = shard.piece
        names = self.members(piece.name)
        if names == [piece.name]:
            return [shard]
        if not piece.shape:  # AdamW's step count, the same for all
            return [Shard(dataclasses.replace(piece, name=name), shard.data) for name in names]
        size = len(shard.data) // piece.sizes[0] if piece.sizes[0] else 0
        row = dataclasses.replace(piece, shape=piece.shape[1:], offsets=piece.offsets[1:], sizes=piece.sizes[1:])
        return [
            Shard(
                dataclasses.replace(row, name=names[piece.offsets[0] + number]),
                shard.data[number * size : (number + 1) * size],
            )
            for number in range(piece.sizes[0])
        ]

    def restack(self, stored: Sequence[Stored]) -> list[Stored]:
        """Pieces under the layers' own names as pieces of the stacked tensors.

        Of however many layers they are: a checkpoint of another model shows itself by another shape.
        """
        numbers = [int(match["number"]) for one in stored if (match := _LAYER.match(one.piece.name))]
        turns = -(-(max(numbers, default=-1) + 1) // self.period)
        found = []
        for one in stored:
            piece = one.piece
            match = _LAYER.match(piece.name)
            if match is None:
                found.append(one)
                continue
            layer, name = int(match["number"]), self.stacked_name(piece.name)
            if not piece.shape:
                if layer < self.period:
                    found.append(dataclasses.replace(one, piece=dataclasses.replace(piece, name=name)))
                continue
            whole = dataclasses.replace(
                piece,
                name=name,
                shape=(turns, *piece.shape),
                offsets=(layer // self.period, *piece.offsets),
                sizes=(1, *piece.sizes),
            )
            found.append(dataclasses.replace(one, piece=whole))
        return found


def stacking_of(config: PretrainedConfig) -> Stacking | None:
    """How the layers of a model can be stacked; None where no group of them comes twice.

    A random number in a layer would be the same in all layers, so that dropout keeps them apart.
    """
    layers = int(config.num_hidden_layers)
    kinds = list(getattr(config, "layer_types", None) or ["full_attention"] * layers)
    if getattr(config, "attention_dropout", 0.0):
        return None
    for period in range(1, layers // 2 + 1):
        if layers % period == 0 and all(kind == kinds[number % period] for number, kind in enumerate(kinds)):
            return Stacking(period, layers // period)
    return None
