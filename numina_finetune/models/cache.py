"""Attention over the keys and values of earlier tokens, kept in tensors of one fixed shape.

Rows are padded on the left, so that the next token of every row goes to the same slot. A forward pass only reads the
cache: it attends to what is there and to its own keys and values beside it, and gives the latter out. Whoever runs it
writes them into the cache once for all layers, where a loop over the layers would otherwise carry a copy around.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PretrainedConfig

from numina_finetune.models.attention import segment_attention
from numina_finetune.models.precision import contracted

CACHED_ATTENTION = "numina_cached"

Place = Callable[[torch.Tensor, str], torch.Tensor]
"""Says where a tensor lies on a mesh, by what it is: ``heads`` or ``attended``."""


@dataclass(frozen=True)
class Past:
    """Earlier tokens, as one forward pass of a single token a row finds them."""

    entries: torch.Tensor
    """``[layers · 2, batch, kv_heads, capacity, head_dim]``: each layer's keys, after the rotary embedding, and values.

    In one tensor, because a compiler that may write its results over its arguments pairs them by their shapes.
    """
    first: torch.Tensor
    """int ``[batch]``: the slot of each row's first token; what is left of it is padding."""
    slot: torch.Tensor
    """int ``[1]``: where the new token will be; what is right of it is empty."""

    def visible(self, window: int | None) -> torch.Tensor:
        """bool ``[batch, capacity]``: what the new token sees; a window of so many keys counts itself."""
        slots = torch.arange(self.entries.shape[-2], device=self.entries.device)
        found = (slots >= self.first[:, None]) & (slots < self.slot)
        return found if window is None else found & (self.slot - slots < window)


class CachePass:
    """What one forward pass finds in the cache, and what it adds to it."""

    def __init__(
        self,
        past: Past | None = None,
        *,
        whole: Callable[..., tuple[torch.Tensor, None]] = segment_attention,
        place: Place = lambda tensor, what: tensor,
    ) -> None:
        """
        Args:
            past: None for the first pass, over whole prompts.
            whole: the attention of that pass; it is given ``segment_ids``, 0 on padding and 1 elsewhere.
        """
        self.past, self.whole, self.place = past, whole, place
        self._by_layer: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._of_all: torch.Tensor | None = None

    def over(self, past: Past | None) -> CachePass:
        """A pass like this one over other layers."""
        return CachePass(past, whole=self.whole, place=self.place)

    @property
    def added(self) -> torch.Tensor:
        """Keys and values of the pass's own tokens, ``[layers · 2, batch, kv_heads, seq, head_dim]``."""
        if self._of_all is not None:
            return self._of_all
        return torch.stack([entry for number in sorted(self._by_layer) for entry in self._by_layer[number]])

    def add_all(self, entries: torch.Tensor) -> None:
        """Take over :attr:`added` of all layers from a loop that has run passes of its own."""
        self._of_all = entries

    def attend(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **others: Any
    ) -> tuple[torch.Tensor, None]:
        """One layer's attention, see :func:`cached_attention`."""
        layer, key = int(module.layer_idx), key.to(value.dtype)  # type: ignore[arg-type]
        query, key, value = (self.place(states, "heads") for states in (query.to(value.dtype), key, value))
        self._by_layer[layer] = key, value
        if self.past is None:
            return self.whole(module, query, key, value, None, **others)
        return self.place(_attend_to_past(query, key, value, self.past, layer, **others), "attended"), None


def cached_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cache: CachePass,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention to a cache and to the new tokens themselves, as a transformers attention function.

    Args:
        module: whose ``layer_idx`` is the layer's number in the pass.
        query: ``[batch, heads, seq, head_dim]``; ``seq`` is 1 but in the first pass.
        key, value: ``[batch, kv_heads, seq, head_dim]``.

    Returns:
        ``[batch, seq, heads, head_dim]`` and no attention weights.
    """
    return cache.attend(module, query, key, value, **others)


def _attend_to_past(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past: Past,
    layer: int,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """``[batch, 1, heads, head_dim]``; probabilities are made in fp32 or more.

    Args:
        s_aux: ``[heads]``, attention sinks, see :func:`numina_finetune.models.attention.segment_attention`.
    """
    batch, heads, kv_heads, size = query.shape[0], query.shape[1], key.shape[1], query.shape[3]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, size)  # heads of one key stand together
    scale = size**-0.5 if scaling is None else scaling
    past_key, past_value = past.entries[2 * layer], past.entries[2 * layer + 1]
    wide = torch.promote_types(value.dtype, torch.float32)
    scores = (contracted("bkgd,bkcd->bkgc", grouped, past_key) * scale).to(wide)
    visible = past.visible(sliding_window)[:, None, None]
    scores = scores.masked_fill(~visible, torch.finfo(wide).min)
    own = ((grouped * key).sum(-1, keepdim=True) * scale).to(wide)
    sinks = [] if s_aux is None else [s_aux.to(wide).view(1, kv_heads, -1, 1).expand(batch, -1, -1, 1)]
    probabilities = torch.softmax(torch.cat([scores, own, *sinks], dim=-1), dim=-1).to(value.dtype)
    capacity = scores.shape[-1]
    mixed = contracted("bkgc,bkcd->bkgd", probabilities[..., :capacity], past_value)
    mixed = mixed + probabilities[..., capacity : capacity + 1] * value
    return mixed.reshape(batch, 1, heads, size)


@contextmanager
def attending_to_cache(config: PretrainedConfig) -> Iterator[None]:
    """The model of ``config`` attends by :func:`cached_attention` within."""
    before = config._attn_implementation
    config._attn_implementation = CACHED_ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


AttentionInterface.register(CACHED_ATTENTION, cached_attention)
