"""Stochastic rounding on XLA: what `numina_finetune.train.rounding` computes, as a JAX function.

torch_xla cannot take a number's bits on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from numina_finetune.train.rounding import FACTORS, KEPT_BITS, MASK, SHIFTS, SPREAD
from numina_finetune.xla.jax_programs import JaxPrograms


class StochasticRounding:
    """A `numina_finetune.train.guarded.Rounding`; elements are counted over the whole parameter, on any mesh."""

    def __init__(self, platform: str) -> None:
        """
        Args:
            platform: of the devices, ``tpu`` or ``cpu``.
        """
        self._programs = JaxPrograms(platform)

    def __call__(self, value: torch.Tensor, step: torch.Tensor, salt: int) -> torch.Tensor:
        (rounded,) = self._programs.call("stochastic_bf16", lambda: _rounding(salt), salt, [value, step])
        return rounded


def _rounding(salt: int) -> Callable[..., Any]:
    import jax
    import jax.numpy as jnp

    def rounded(value: Any, step: Any) -> tuple[Any]:
        element = jnp.zeros(value.shape, jnp.uint32)
        for dim, size in enumerate(value.shape):
            element = element * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, value.shape, dim)
        mixed = element * jnp.uint32(SPREAD[0])
        mixed ^= step.astype(jnp.uint32) * jnp.uint32(SPREAD[1]) + jnp.uint32(salt % 2**32)
        for shift, factor in zip(SHIFTS, (*FACTORS, None), strict=True):
            mixed ^= mixed >> shift
            mixed = mixed if factor is None else mixed * jnp.uint32(factor)
        bits = jax.lax.bitcast_convert_type(value, jnp.uint32) + (mixed & MASK)
        return ((bits >> KEPT_BITS).astype(jnp.uint16).view(jnp.bfloat16),)

    return rounded
