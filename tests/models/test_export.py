"""Weights are written one after another, as any reader of the format has them."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from numina_finetune.models import export

SHAPES = {"b": (5, 7), "a": (3,), "one": (), "none": (0, 4), "c": (64, 3, 2)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_two_tensors_are_in_memory_while_a_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(export, "_CAST", 10)
    values = {name: np.random.default_rng(0).normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    alive: list[weakref.ref[np.ndarray]] = []

    def read(name: str) -> torch.Tensor:
        assert not any(reference() is not None for reference in alive)
        memory = values[name].copy()
        alive.append(weakref.ref(memory))
        return torch.from_numpy(memory)

    planned = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in SHAPES.items()}
    export._write_file(tmp_path / "model.safetensors", planned, read)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == values.keys()
    for name, tensor in found.items():
        assert tensor.dtype == dtype and torch.equal(tensor, torch.from_numpy(np.asarray(values[name])).to(dtype))
