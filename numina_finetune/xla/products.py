"""What a TPU multiplies matrices in."""

from __future__ import annotations

import torch_xla


def multiply_as_typed() -> None:
    """Let every matrix product of this process be one of its operands' own type, as on any other device.

    By default a TPU rounds fp32 operands to bf16. Products of bf16 are the same either way, and take as long; those of
    fp32 take six passes. What is lowered before is left as it is. `torch_xla.backends` has the same call, and warns
    whoever makes it.
    """
    torch_xla._XLAC._xla_set_mat_mul_precision("highest")
