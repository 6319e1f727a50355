"""``--torch-compile``: each layer's forward and backward pass compiled by torch's inductor, attention left out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from numina_finetune.torch_native.attention import keep_out_of_graphs


def compile_layers(model: PreTrainedModel, remat: str) -> None:
    """Compile the layers of ``model``, in place.

    Only what a layer's call ends in is replaced: no module is wrapped, so that parameters keep their names, and what
    hooks onto the call (FSDP2) stays outside. Passes without gradients, whose shapes are others, are not compiled.

    Args:
        remat: ``none`` or ``full``; what is computed again is compiled as well.
    """
    keep_out_of_graphs()
    layers = model.base_model.layers
    # Layers share what is compiled, but for those whose weights are presented in bf16: each has classes of its own.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 2 * len(layers))
    for layer in layers:
        layer.forward = _compiled(layer, recomputed=remat == "full")


def _compiled(layer: nn.Module, *, recomputed: bool) -> Callable[..., Any]:
    plain: Callable[..., Any] = layer.forward
    compiled = torch.compile(plain)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        if recomputed:
            return checkpoint(partial(compiled, **kwargs), *args, use_reentrant=False)
        return compiled(*args, **kwargs)

    return forward
