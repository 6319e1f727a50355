"""Stacked weights keep the names that the layers' own weights have on disk."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import Qwen3Config

from numina_finetune.checkpoint.layout import Piece, Stored
from numina_finetune.checkpoint.shards import Shard
from numina_finetune.xla.stacking import Stacking, stacking_of


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (["full"] * 6, Stacking(1, 6)),
        (["sliding", "full"] * 3, Stacking(2, 3)),
        (["sliding", "sliding", "full"] * 2, Stacking(3, 2)),
        (["full", "full", "sliding"], None),
        (["full"], None),
    ],
)
def test_layers_are_grouped_by_the_period_in_which_they_alternate(kinds: list[str], expected: Stacking | None) -> None:
    types = [f"{kind}_attention" for kind in kinds]
    assert stacking_of(Qwen3Config(num_hidden_layers=len(kinds), layer_types=types)) == expected


def test_layers_with_dropout_are_not_looped_over() -> None:
    assert stacking_of(Qwen3Config(num_hidden_layers=4, attention_dropout=0.1)) is None


@pytest.mark.parametrize("period", [1, 2])
def test_a_stack_is_written_as_the_layers_own_weights_and_read_back(period: int) -> None:
    stacking = Stacking(period, 3)
    stack = np.arange(3 * 2 * 2, dtype=np.float32).reshape(3, 2, 2)
    name = stacking.stacked_name(f"model.model.layers.{period - 1}.mlp.up_proj.weight")
    piece = Piece(name, "float32", (3, 4, 2), (0, 2, 0), (3, 2, 2))
    written = stacking.unstack(Shard(piece, stack.reshape(-1).view(np.uint8)))
    assert [shard.piece.name for shard in written] == [
        f"model.model.layers.{layer}.mlp.up_proj.weight" for layer in range(period - 1, 3 * period, period)
    ]
    for row, shard in zip(stack, written, strict=True):
        assert (shard.piece.shape, shard.piece.offsets, shard.piece.sizes) == ((4, 2), (2, 0), (2, 2))
        assert (shard.data.view(np.float32) == row.reshape(-1)).all()
    held = stacking.restack([Stored(shard.piece, "f", 0) for shard in written])
    assert [(one.piece.name, one.piece.offsets, one.piece.sizes) for one in held] == [
        (name, (turn, 2, 0), (1, 2, 2)) for turn in range(3)
    ]


def test_what_is_no_layers_keeps_its_name_and_step_counts_are_written_for_each_layer() -> None:
    stacking = Stacking(1, 2)
    assert stacking.members(stacking.stacked_name("model.norm.weight")) == ["model.norm.weight"]
    count = Shard(Piece("optim.model.layers.[0::1].w.step", "float32", (), (), ()), np.zeros(4, np.uint8))
    written = stacking.unstack(count)
    assert [shard.piece.name for shard in written] == [f"optim.model.layers.{n}.w.step" for n in range(2)]
    (held,) = stacking.restack([Stored(shard.piece, "f", 0) for shard in written])
    assert held.piece == count.piece
