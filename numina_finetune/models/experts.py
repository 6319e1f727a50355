"""gpt-oss's experts with shapes that depend on no routing, as a transformers experts function.

transformers' own loop gathers each expert's tokens, so that every step has other shapes. Here every expert sees every
token and its result counts by the share that the router gave it, most often none: experts / top_k times the products,
which is what a compiler or a test wants, and no token is ever dropped.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import ExpertsInterface

from numina_finetune.models.precision import contracted

STATIC_EXPERTS = "numina_static"
ADAPTERS = "adapters"
"""Where experts hold their adapters (`numina_finetune.models.lora`), by the name of the parameter."""


def expert_weight(module: Any, name: str) -> torch.Tensor:
    """``gate_up_proj`` or ``down_proj`` as tokens meet it, ``[experts, in, out]``: with what its adapter adds.

    Every form of the experts takes its weights from here.
    """
    weight: torch.Tensor = getattr(module, name)
    adapters = getattr(module, ADAPTERS, {})
    return adapters[name](weight) if name in adapters else weight


def routed_shares(router_indices: torch.Tensor, routing_weights: torch.Tensor, experts: int) -> torch.Tensor:
    """What each expert's result counts for each token.

    Args:
        router_indices: ``[tokens, top_k]`` int, the chosen experts, no one twice for a token.
        routing_weights: ``[tokens, top_k]``, their shares.

    Returns:
        ``[tokens, experts]`` in the shares' type, 0 for the experts that were not chosen.
    """
    number = torch.arange(experts, device=router_indices.device)
    chosen = router_indices.unsqueeze(-1) == number  # compared, not scattered: a scatter is split badly over devices
    return (chosen.to(routing_weights.dtype) * routing_weights.unsqueeze(-1)).sum(1)


def static_experts(
    module: Any, hidden_states: torch.Tensor, router_indices: torch.Tensor, routing_weights: torch.Tensor
) -> torch.Tensor:
    """The experts' results for each token, weighted and summed.

    Args:
        module: transformers' experts: ``gate_up_proj [experts, hidden, 2·inner]`` with gate and up interleaved,
            ``down_proj [experts, inner, hidden]``, and their biases.
        hidden_states: ``[tokens, hidden]``.
        router_indices, routing_weights: ``[tokens, top_k]``, see :func:`routed_shares`.

    Returns:
        ``[tokens, hidden]`` in the hidden states' type.
    """
    down, down_bias = expert_weight(module, "down_proj"), module.down_proj_bias
    experts = down.shape[0]
    shares = routed_shares(router_indices, routing_weights, experts)
    opened = torch.bmm(hidden_states.expand(experts, -1, -1), expert_weight(module, "gate_up_proj"))
    gated = module._apply_gate(opened + module.gate_up_proj_bias.unsqueeze(1))
    # Weighted before the second product, which then sums over experts as well: [experts, tokens, hidden] never exists.
    weighted = (gated * shares.T.unsqueeze(-1)).to(down.dtype)
    mixed = contracted("eti,eih->th", weighted, down) + shares @ down_bias.to(shares.dtype)
    result: torch.Tensor = mixed.to(hidden_states.dtype)
    return result


ExpertsInterface.register(STATIC_EXPERTS, static_experts)
