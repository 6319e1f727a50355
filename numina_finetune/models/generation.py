"""Decoding a batch of left-padded rows token by token: the arithmetic, the same on every device.

Two programs do it all: :func:`begin` reads the prompts and gives each row's first token, :func:`advance` gives the next
one. Every shape is fixed by the prompts' padded width and by how many tokens may come; rows that have ended go on with
padding, which nobody sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from numina_finetune.models.cache import CachePass, Past, attending_to_cache
from numina_finetune.models.sampling import drawn, likeliest

READ_EVERY = 16
"""Tokens between two looks from the host: whether all rows have ended."""


class Prompts(NamedTuple):
    """What the host gives for a batch."""

    ids: torch.Tensor
    """int32 ``[batch, width]``, padded on the left."""
    first: torch.Tensor
    """int32 ``[batch]``: where in ``ids`` each prompt begins."""
    stops: torch.Tensor
    """int32 ``[stops]``: tokens that end a row; at least one, -1 where there is none."""
    pad: torch.Tensor
    """int32 ``[1]``: the token after the end."""
    controls: torch.Tensor
    """See :func:`numina_finetune.models.sampling.drawn`."""
    uniforms: torch.Tensor
    """fp32 ``[batch, tokens that may come]``; of width 0 where the likeliest token is taken."""


@dataclass
class Rows:
    """A batch under way; on the devices, and changed in place."""

    prompts: Prompts
    entries: torch.Tensor
    """See :class:`numina_finetune.models.cache.Past`."""
    token: torch.Tensor
    """int32 ``[batch, 1]``: the newest, which the model has not seen."""
    recent: torch.Tensor
    """int32 ``[batch, READ_EVERY]``: token number n stands in column n modulo the width."""
    ended: torch.Tensor
    """bool ``[batch]``."""
    count: torch.Tensor
    """int32 ``[1]``: tokens given so far."""


class Forward(Protocol):
    """A model as it lies on the devices."""

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, cache: CachePass) -> torch.Tensor:
        """Logits ``[batch, vocabulary]`` after the last of ``ids``, fp32.

        Args:
            ids: int32 ``[batch, seq]``.
            positions: int32 ``[batch, seq]``, counted from each row's first token; below 0 on padding.
            cache: holds the tokens' keys and values afterwards.
        """


Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Puts ``[layers · 2, batch, kv_heads, 1, head_dim]`` into a cache, in place, at a slot (int32 ``[1]``)."""


def begin(forward: Forward, prompts: Prompts, cache: CachePass, *, new_tokens: int) -> Rows:
    """Read the prompts, and give each row its first token.

    Args:
        cache: an empty pass.
        new_tokens: room that the cache has besides the prompts.
    """
    batch, width = prompts.ids.shape
    device = prompts.ids.device
    positions = torch.arange(width, device=device, dtype=torch.int32) - prompts.first[:, None]
    logits = forward(prompts.ids, positions, cache)
    rows = Rows(
        prompts,
        nn.functional.pad(cache.added, (0, 0, 0, new_tokens)),
        token=torch.zeros(batch, 1, dtype=torch.int32, device=device),
        recent=torch.zeros(batch, READ_EVERY, dtype=torch.int32, device=device),
        ended=torch.zeros(batch, dtype=torch.bool, device=device),
        count=torch.zeros(1, dtype=torch.int32, device=device),
    )
    _give(rows, logits)
    return rows


def advance(forward: Forward, write: Write, rows: Rows, make_pass: Callable[[Past], CachePass] = CachePass) -> None:
    """Give each row its next token."""
    first = rows.prompts.first
    slot = rows.prompts.ids.shape[1] + rows.count - 1
    cache = make_pass(Past(rows.entries, first, slot))
    logits = forward(rows.token, (slot - first)[:, None], cache)
    write(rows.entries, cache.added, slot)
    _give(rows, logits)


def _give(rows: Rows, logits: torch.Tensor) -> None:
    prompts, count = rows.prompts, rows.count
    if prompts.uniforms.shape[1]:
        now = torch.arange(prompts.uniforms.shape[1], device=count.device) == count
        token = drawn(logits, torch.where(now, prompts.uniforms, 0.0).sum(-1), prompts.controls)
    else:
        token = likeliest(logits)
    token = torch.where(rows.ended, prompts.pad, token)
    column = torch.arange(READ_EVERY, device=count.device) == count % READ_EVERY
    rows.recent.copy_(torch.where(column, token[:, None], rows.recent))
    rows.ended.copy_(rows.ended | (token[:, None] == prompts.stops).any(-1))
    rows.token.copy_(token[:, None])
    rows.count.copy_(count + 1)


def last_hidden(model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor, cache: CachePass) -> torch.Tensor:
    """``[batch, hidden]`` of the last tokens; see :class:`Forward`, within :func:`at_rest`."""
    hidden: torch.Tensor = model.base_model(
        input_ids=ids,
        position_ids=positions.clamp(min=0),
        segment_ids=(positions >= 0).int(),
        use_cache=False,
        cache=cache,
    ).last_hidden_state
    return hidden[:, -1]


def logits_of(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """``[batch, hidden]`` to ``[batch, vocabulary]``, fp32 or more."""
    logits: torch.Tensor = model.get_output_embeddings()(hidden)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def next_logits(model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor, cache: CachePass) -> torch.Tensor:
    """A :class:`Forward`, within :func:`at_rest`."""
    return logits_of(model, last_hidden(model, ids, positions, cache))


@contextmanager
def at_rest(model: PreTrainedModel) -> Iterator[None]:
    """``model`` takes no gradients, drops nothing, and attends to a cache within; afterwards it trains as before."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), attending_to_cache(model.config):
            yield
    finally:
        model.train(was_training)


class PlainDecoder:
    """Decodes with a model that computes on one device; implements `numina_finetune.train.decoding.Decoder`.

    Nothing is compiled, so that a batch is as long and as wide as its prompts are.
    """

    def __init__(self, model: PreTrainedModel, forward: Forward | None = None) -> None:
        """
        Args:
            model: within :func:`at_rest` as long as this decodes.
            forward: through what gathers the model's weights, where they are split; the model itself if None.
        """
        self._model, self._forward = model, forward or partial(next_logits, model)
        self._rows: Rows

    def shape(self, rows: int, longest: int) -> tuple[int, int]:
        return rows, longest

    def begin(self, prompts: Prompts, new_tokens: int) -> None:
        on_device = Prompts(*(tensor.to(self._model.device) for tensor in prompts))
        self._rows = begin(self._forward, on_device, CachePass(), new_tokens=new_tokens)

    def advance(self) -> None:
        advance(self._forward, _write, self._rows)

    def recent(self) -> torch.Tensor:
        return self._rows.recent.cpu()

    def end(self, ended: torch.Tensor) -> None:
        self._rows.ended.copy_(ended)


def _write(cache: torch.Tensor, added: torch.Tensor, slot: torch.Tensor) -> None:
    cache.index_copy_(3, slot.long(), added)
