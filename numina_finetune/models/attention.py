"""Causal attention within packed segments, as a transformers attention function.

Registered in ``AttentionInterface`` with no mask function beside it: transformers then builds no mask (which would
read values back from the device) and passes extra model arguments such as ``segment_ids`` through to here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PretrainedConfig

SEGMENT_ATTENTION = "numina_segments"


def dropout_faults(config: PretrainedConfig) -> list[str]:
    """Why a kernel that drops no attention scores cannot train the model."""
    rate = getattr(config, "attention_dropout", 0.0)
    fix = "use --attention torch, or set it to 0 in the model's config.json"
    return [f"the model's attention_dropout is {rate}, and the kernel drops nothing: {fix}"] if rate else []


def segment_mask(segment_ids: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """Which key each query may see.

    Args:
        segment_ids: ``[batch, seq]`` int; positions of one packed sequence share a number.
        window: keys a query reaches back, itself included; None = all of its segment.

    Returns:
        ``[batch, 1, seq, seq]`` bool, True = may see. Padding sees padding, so that no softmax row is empty.
    """
    same_segment = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return same_segment & causal_mask(segment_ids.shape[1], window, segment_ids.device)


def causal_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool ``[length, length]``: which key each query of one sequence may see; see :func:`segment_mask`."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def segment_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segment_ids: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention, causal within each segment.

    Args:
        query: ``[batch, heads, seq, head_dim]``.
        key, value: ``[batch, kv_heads, seq, head_dim]``; heads are a multiple of kv_heads.
        segment_ids: ``[batch, seq]``, see :func:`segment_mask`.
        s_aux: ``[heads]``, transformers' name for attention sinks: a logit that takes a share and gives nothing.

    Returns:
        ``[batch, seq, heads, head_dim]`` and no attention weights, as transformers expects.
    """
    groups = query.shape[1] // key.shape[1]
    query, key, value = query.to(value.dtype), repeat_heads(key.to(value.dtype), groups), repeat_heads(value, groups)
    mask = segment_mask(segment_ids, sliding_window)
    if s_aux is None:
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
        )
    else:
        output = attention_with_sinks(query, key, value, mask, s_aux, dropout, scaling)
    return output.transpose(1, 2).contiguous(), None


def attention_with_sinks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    sinks: torch.Tensor,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """:func:`segment_attention` with sinks and as many key heads as query heads, ``[batch, heads, seq, head_dim]``.

    The probabilities are made in fp32 or more.
    """
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    wide = torch.promote_types(scores.dtype, torch.float32)
    scores = scores.to(wide).masked_fill(~mask, torch.finfo(wide).min)
    sink = sinks.to(wide).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    probabilities = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1].to(value.dtype)
    return nn.functional.dropout(probabilities, dropout) @ value


def repeat_heads(states: torch.Tensor, groups: int) -> torch.Tensor:
    """``[batch, kv_heads, seq, head_dim]`` to ``[batch, kv_heads·groups, seq, head_dim]``."""
    if groups == 1:
        return states
    batch, heads, length, head_dim = states.shape
    return states[:, :, None].expand(batch, heads, groups, length, head_dim).reshape(batch, -1, length, head_dim)


AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)
