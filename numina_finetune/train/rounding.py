"""Stochastic rounding to bf16: up or down with the probabilities that keep the mean.

Without it bf16 weights do not train at the rates of fine-tuning: an update smaller than half the distance to the next
bf16 number is lost each time. The bits that decide come from a hash of seed, step, parameter and element, and from
nothing else, so that a resumed run rounds as one that was never stopped.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

KEPT_BITS, MASK = 16, 0xFFFF
"""Of an fp32 number bf16 keeps the upper half."""
SHIFTS = 16, 15, 16
FACTORS = 0x7FEB352D, 0x846CA68B
"""Of a hash of 32 bits (https://github.com/skeeto/hash-prospector, lowbias32)."""
SPREAD = 0x9E3779B1, 0x85EBCA77
"""Odd numbers that element and step are multiplied by before they are put together."""


def round_stochastically(value: torch.Tensor, step: torch.Tensor, salt: int) -> torch.Tensor:
    """A `numina_finetune.train.guarded.Rounding` for parameters that are whole or split (DTensors).

    An element is rounded alike however its parameter is split.
    """
    if not isinstance(value, DTensor):
        return stochastic_bf16(value, step, salt)
    _, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
    begin = sum(first * stride for first, stride in zip(offset, value.stride(), strict=True))
    whole_step = step.full_tensor() if isinstance(step, DTensor) else step
    return DTensor.from_local(
        stochastic_bf16(value.to_local(), whole_step, salt, begin),
        value.device_mesh,
        value.placements,
        run_check=False,
        shape=value.shape,
        stride=value.stride(),
    )


def stochastic_bf16(value: torch.Tensor, step: torch.Tensor, salt: int, begin: int = 0) -> torch.Tensor:
    """
    Args:
        value: fp32.
        step: scalar, a whole number.
        begin: number of the first element in the whole parameter, where this is a part along its first dimension.
    """
    element = torch.arange(begin, begin + value.numel(), dtype=torch.int64, device=value.device).to(torch.int32)
    mixed = element * _signed(SPREAD[0]) ^ (step.to(torch.int32) * _signed(SPREAD[1]) + _signed(salt))
    for shift, factor in zip(SHIFTS, (*FACTORS, None), strict=True):
        mixed = mixed ^ (mixed >> shift & (1 << 32 - shift) - 1)
        mixed = mixed if factor is None else mixed * _signed(factor)
    bits = value.contiguous().view(torch.int32)
    return (bits + (mixed.view(value.shape) & MASK) & ~MASK).view(torch.float32).to(torch.bfloat16)


def _signed(number: int) -> int:
    """The 32 bits of a number as those of a signed one, as torch has no others."""
    return (number + 2**31) % 2**32 - 2**31
