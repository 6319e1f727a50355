"""MXFP4, the form in which gpt-oss's experts are released: 4-bit floats in blocks of 32 that share a power of two.

Of a parameter ``[experts, in, out]`` there are, per expert, ``[out, in]`` values (transposed, and gate and up rows
interleaved as in the parameter itself)::

    …_blocks  uint8 [experts, out, in / 32, 16]   two values a byte, the low half first
    …_scales  uint8 [experts, out, in / 32]       exponent of the block's factor, 127 more than it is
"""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

GROUP = 32
"""Values along ``in`` that share a scale."""
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""E2M1: one bit of sign, two of exponent, one of mantissa."""
_VALUES = torch.tensor([*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES)])
_PAIRS = torch.stack([_VALUES.repeat(16), _VALUES.repeat_interleave(16)], dim=-1)
"""``[256, 2]``: what a byte stands for."""
_FACTORS = torch.ldexp(torch.ones(256), torch.arange(256) - 127)
"""``[256]``: what a scale stands for."""


def is_mxfp4(config: PretrainedConfig) -> bool:
    """Whether a model's configuration, as it was read, says that its weights are in this form."""
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return getattr(method, "value", method) == "mxfp4"


def dequantise(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """``[…, groups, 16]`` bytes and ``[…, groups]`` scales to the ``[…, groups · 32]`` values in fp32.

    A value has two significant bits, so that bf16 holds it as exactly.
    """
    values = _PAIRS[blocks.int()].flatten(-2)
    values *= _FACTORS[scales.int()].unsqueeze(-1)
    return values.flatten(-2)
