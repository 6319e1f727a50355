"""``--remat`` on the native backend: what the backward pass computes again."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import PreTrainedModel


def recompute(model: PreTrainedModel, remat: str) -> None:
    """Let each layer keep its input only, or with ``dots`` besides what matrix products and attention gave."""
    if remat != "none":
        kept = {"context_fn": _keep_products} if remat == "dots" else {}
        model.activation_checkpointing_enable({"use_reentrant": False, **kept})


def _keep_products() -> Any:
    aten = torch.ops.aten
    return create_selective_checkpoint_contexts(  # type: ignore[no-untyped-call]
        [
            aten.mm.default,
            aten.bmm.default,
            aten.addmm.default,
            aten._flash_attention_forward.default,
            aten._scaled_dot_product_flash_attention.default,
            aten._scaled_dot_product_flash_attention_for_cpu.default,
            aten._scaled_dot_product_efficient_attention.default,
            aten._scaled_dot_product_cudnn_attention.default,
        ]
    )
