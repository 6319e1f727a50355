"""Attention of packed segments on CPUs and GPUs, each segment by itself, as a transformers attention function."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PretrainedConfig

from numina_finetune.errors import ConfigError
from numina_finetune.models.attention import SEGMENT_ATTENTION, attention_with_sinks, causal_mask, repeat_heads
from numina_finetune.torch_native.batches import Segments

SEGMENTS, FLASH = "numina_native_segments", "numina_native_flash"
_IMPLEMENTATIONS = {"segments": SEGMENTS, "flash": FLASH, "torch": SEGMENT_ATTENTION}


def attention_for(wish: str, config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> str:
    """``segments``, ``flash`` or ``torch``: what ``--attention`` asks for, auto resolved.

    Args:
        dtype: that the model computes in.

    Raises:
        ConfigError: flash is asked for where it cannot be.
    """
    faults = _flash_faults(config, device, dtype)
    if wish == "flash" and faults:
        raise ConfigError(f"--attention flash {'; '.join(faults)}: use auto or segments")
    if wish == "auto":
        return "segments" if faults else "flash"
    return wish


def _flash_faults(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why torch's flash attention over segments cannot be used."""
    faults = []
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        faults.append("needs a GPU of compute capability 8.0 (Ampere) or newer")
    if dtype != torch.bfloat16:
        faults.append("computes in bf16 only (--precision bf16)")
    if config.model_type == "gpt_oss":
        faults.append("has no attention sinks, which gpt-oss needs")
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if size % 8 or size > 256:
        faults.append(f"takes heads of 8, 16, … 256 values, not {size}")
    return faults


def use_attention(config: PretrainedConfig, name: str) -> None:
    """Let the model of ``config`` attend by ``name``, see :func:`attention_for`."""
    config._attn_implementation = _IMPLEMENTATIONS[name]


def segments_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: Segments,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention, causal, of one segment after another; no mask but where a window cuts something.

    Args:
        query, key, value, s_aux: see `numina_finetune.models.attention.segment_attention`.
        segments: of the micro-batch's rows laid end to end.

    Returns:
        ``[batch, seq, heads, head_dim]`` and no attention weights.
    """
    batch, heads, length, size = query.shape
    lengths = list(segments.lengths)
    rows = [torch.split(_end_to_end(states.to(value.dtype)), lengths, dim=2) for states in (query, key, value)]
    attended = [
        _attend(q, k, v, sliding_window, s_aux, dropout, scaling).transpose(1, 2) for q, k, v in zip(*rows, strict=True)
    ]
    return torch.cat(attended, dim=1).view(batch, length, heads, size), None


def _end_to_end(states: torch.Tensor) -> torch.Tensor:
    """``[batch, heads, seq, head_dim]`` to ``[1, heads, batch·seq, head_dim]``."""
    return states.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | None,
    sinks: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """One segment, ``[1, heads, tokens, head_dim]``."""
    tokens, groups = query.shape[2], query.shape[1] // key.shape[1]
    if sinks is not None:
        mask = causal_mask(tokens, window, query.device)
        key, value = repeat_heads(key, groups), repeat_heads(value, groups)
        return attention_with_sinks(query, key, value, mask, sinks, dropout, scaling)
    cut = causal_mask(tokens, window, query.device) if window is not None and tokens > window else None
    return nn.functional.scaled_dot_product_attention(
        query, key, value, cut, dropout, is_causal=cut is None, scale=scaling, enable_gqa=groups > 1
    )


def flash_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: Segments,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What :func:`segments_attention` gives, in one kernel for all segments; see :func:`_flash_faults`."""
    batch, heads, length, size = query.shape
    tokens = (_end_to_end(states.to(value.dtype))[0].transpose(0, 1) for states in (query, key, value))
    longest = max(segments.lengths)
    attended = torch.ops.aten._flash_attention_forward(
        *tokens,
        segments.starts,
        segments.starts,
        longest,
        longest,
        dropout,
        True,  # causal
        False,  # no debug mask
        scale=scaling,
        window_size_left=None if sliding_window is None else sliding_window - 1,
        window_size_right=None if sliding_window is None else 0,
    )[0]
    return attended.view(batch, length, heads, size), None


def keep_out_of_graphs() -> None:
    """Let ``torch.compile`` go around attention: where segments begin is another matter in each step."""
    AttentionInterface.register(SEGMENTS, torch.compiler.disable(segments_attention))  # type: ignore[no-untyped-call]
    AttentionInterface.register(FLASH, torch.compiler.disable(flash_attention))  # type: ignore[no-untyped-call]


AttentionInterface.register(SEGMENTS, segments_attention)
AttentionInterface.register(FLASH, flash_attention)
