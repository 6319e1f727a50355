"""Decoding on the mesh, with the model as it was placed for training: no weight is moved, copied or cast for good.

Two programs for each padded width of prompts: one reads the prompts as a training step would, with weights gathered
layer by layer; the other gives one token a row, and leaves the weights where they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
import torch_xla
import torch_xla.core.xla_builder as xb
import torch_xla.core.xla_model as xm
import torch_xla.distributed.spmd as xs
from transformers import AttentionInterface
from transformers.integrations.moe import ExpertsInterface

from numina_finetune.config import BATCH_AXES
from numina_finetune.models import generation
from numina_finetune.models.attention import segment_attention
from numina_finetune.models.cache import CachePass
from numina_finetune.models.experts import STATIC_EXPERTS
from numina_finetune.models.generation import Prompts, Rows, last_hidden, logits_of
from numina_finetune.xla.constraints import REPLICA_AXES, Constraints
from numina_finetune.xla.experts import SPLIT_EXPERTS
from numina_finetune.xla.placement import Placed
from numina_finetune.xla.sharding import PartitionSpec, axes_that_divide
from numina_finetune.xla.splash import SPLASH_ATTENTION

SMALLEST_BUCKET = 128
"""Prompts are padded to this length or to a power of two times it; what the attention kernel takes are multiples."""

_PLACES: dict[str, PartitionSpec] = {
    # [batch, heads, seq, head_dim], as the weights' parts give them, and as the cache lies
    "projected": (REPLICA_AXES, "tensor", None, None),
    "heads": (BATCH_AXES, "tensor", None, None),
    # [batch, seq, heads, head_dim], on its way to weights that stay where they are
    "attended": (REPLICA_AXES, None, "tensor", None),
    # [layers · 2, batch, kv_heads, capacity, head_dim]
    "cache": (None, BATCH_AXES, "tensor", None, None),
    # [batch, hidden] and [batch, vocabulary] at the output layer, and where a row's token is chosen
    "last": (REPLICA_AXES, None),
    "logits": (REPLICA_AXES, "tensor"),
    "scores": (BATCH_AXES, None),
}


class MeshDecoder:
    """Implements `numina_finetune.train.decoding.Decoder` for a placed model."""

    def __init__(self, placed: Placed, device: torch.device, batch_size: int) -> None:
        """
        Args:
            batch_size: rows of every batch; the next number that the data-parallel replicas divide is taken.
        """
        self._model, self._constraints, self._device = placed.module.model, placed.constraints, device
        replicas = self._constraints.shape.data_parallel_size
        self.rows = -(-batch_size // replicas) * replicas
        config = self._model.config
        self._attention, self._experts = config._attn_implementation, config._experts_implementation
        # An answer shall not depend on which tokens of other rows came to the same expert.
        drops = self._experts == SPLIT_EXPERTS and ExpertsInterface()[SPLIT_EXPERTS].drops
        self._reading_experts = STATIC_EXPERTS if drops else self._experts
        self._place, self._attending = partial(_place, self._constraints), partial(_attending, self._constraints)
        self._batch: Rows | None = None

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """See :func:`numina_finetune.models.generation.at_rest`."""
        try:
            with generation.at_rest(self._model):
                yield
        finally:
            self._model.config._experts_implementation = self._experts
            self._batch = None

    def shape(self, rows: int, longest: int) -> tuple[int, int]:
        width = SMALLEST_BUCKET
        while width < longest:
            width *= 2
        return self.rows, width

    def begin(self, prompts: Prompts, new_tokens: int) -> None:
        self._batch = None  # its memory is the next one's
        whole = AttentionInterface()[SPLASH_ATTENTION] if self._attention == SPLASH_ATTENTION else segment_attention
        rows = generation.begin(
            self._read, Prompts(*map(self._put, prompts)), CachePass(whole=whole), new_tokens=new_tokens
        )
        rows.entries = self._place(rows.entries, "cache")
        for name, held in self._whole(rows).items():
            setattr(rows, name, held)
        self._batch = rows
        torch_xla.sync()

    def advance(self) -> None:
        generation.advance(self._decode, self._write, self._rows, partial(CachePass, place=self._attending))
        torch_xla.sync()

    def recent(self) -> torch.Tensor:
        return self._rows.recent.cpu()

    def end(self, ended: torch.Tensor) -> None:
        self._rows.ended = self._put(ended)

    @property
    def _rows(self) -> Rows:
        assert self._batch is not None, "begin() comes first"
        return self._batch

    def _whole(self, rows: Rows) -> dict[str, torch.Tensor]:
        """What is small, whole on every device, so that any host can read it and no program splits it otherwise."""
        held = {name: getattr(rows, name) for name in ("token", "recent", "ended", "count")}
        return {name: self._constraints.mark(tensor, (None,) * tensor.ndim) for name, tensor in held.items()}

    def _read(self, ids: torch.Tensor, positions: torch.Tensor, cache: CachePass) -> torch.Tensor:
        """Whole prompts are worth gathering the layers' weights, as in training; the output layer sees one token."""
        self._model.config._experts_implementation = self._reading_experts
        hidden = last_hidden(self._model, ids, positions, cache)
        with self._constraints.weights_at_rest():
            return self._scores(hidden)

    def _decode(self, ids: torch.Tensor, positions: torch.Tensor, cache: CachePass) -> torch.Tensor:
        self._model.config._experts_implementation = STATIC_EXPERTS  # too few rows for the kernels' blocks
        with self._constraints.weights_at_rest():
            return self._scores(last_hidden(self._model, ids, positions, cache))

    def _scores(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = logits_of(self._model, self._place(hidden, "last"))
        return self._place(self._place(logits, "logits"), "scores")

    def _put(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that every host has, whole on every device."""
        spec = xs.ShardingSpec(self._constraints.mesh, (None,) * tensor.ndim)
        moved: list[torch.Tensor] = xm.send_cpu_data_to_device([tensor], self._device, spec)
        return moved[0]

    def _write(self, cache: torch.Tensor, added: torch.Tensor, slot: torch.Tensor) -> None:
        (written,) = torch_xla._XLAC._xla_user_computation(
            "numina::write",
            (cache, self._place(added, "cache"), slot),
            _write_program(tuple(cache.shape), tuple(added.shape), cache.dtype),
        )
        cache.copy_(self._place(written, "cache"))


def _place(constraints: Constraints, tensor: torch.Tensor, what: str) -> torch.Tensor:
    """``tensor``, split as the table says of ``what``, over the axes that divide it."""
    spec = zip(_PLACES[what], tensor.shape, strict=True)
    return constraints.mark(
        tensor, tuple(axes and axes_that_divide(axes, size, constraints.shape) for axes, size in spec)
    )


def _attending(constraints: Constraints, tensor: torch.Tensor, what: str) -> torch.Tensor:
    """See :data:`numina_finetune.models.cache.Place`."""
    if what == "heads":  # else the split by rows would reach back to the products, and gather their weights
        tensor = _place(constraints, tensor, "projected")
    return _place(constraints, tensor, what)


@lru_cache
def _write_program(cache: tuple[int, ...], added: tuple[int, ...], dtype: torch.dtype) -> Any:
    """``(cache, added, slot)`` to the cache with ``added`` at a slot of its fourth dimension.

    An index_copy would become a scatter, which is not done in place.
    """
    builder = xb.create_builder("write")
    shapes = ((dtype, cache), (dtype, added), (torch.int32, (1,)))
    into, what, slot = (
        xb.mkparam(builder, number, xb.mkshape(xb.Op.from_torch_type(each), shape))
        for number, (each, shape) in enumerate(shapes)
    )
    at = slot.reshape([])
    none = at.zeros_like()
    return into.dynamic_update_slice(what, [none, none, none, at, none]).build("write")
