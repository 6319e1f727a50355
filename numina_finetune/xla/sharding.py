"""Which mesh axes split which dimension of which parameter, by name, for each architecture.

A linear layer's weight is ``[out, in]``. Megatron's scheme over ``tensor``: the first matrix of a pair splits its
outputs, the second its inputs; ``fsdp`` takes the other dimension.
"""

from __future__ import annotations

import re

from numina_finetune.mesh import MeshShape

PartitionSpec = tuple[str | tuple[str, ...] | None, ...]

_DECODER_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embed_tokens\.weight$", ("tensor", "fsdp")),
    (r"lm_head\.weight$", ("tensor", "fsdp")),
    (r"self_attn\.[qkv]_proj\.weight$", ("tensor", "fsdp")),
    (r"self_attn\.[qkv]_proj\.bias$", ("tensor",)),
    (r"self_attn\.o_proj\.weight$", ("fsdp", "tensor")),
    (r"self_attn\.o_proj\.bias$", (None,)),
    (r"mlp\.(gate|up)_proj\.weight$", ("tensor", "fsdp")),
    (r"mlp\.(gate|up)_proj\.bias$", ("tensor",)),
    (r"mlp\.down_proj\.weight$", ("fsdp", "tensor")),
    (r"mlp\.down_proj\.bias$", (None,)),
    (r"norm\.weight$", (None,)),
)

_EXPERT_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    # [experts, in, out]. Gate and up are neighbours, so that any even part of them is whole pairs.
    (r"experts\.gate_up_proj$", ("expert", "fsdp", "tensor")),
    (r"experts\.gate_up_proj_bias$", ("expert", "tensor")),
    (r"experts\.down_proj$", ("expert", "tensor", "fsdp")),
    (r"experts\.down_proj_bias$", ("expert", None)),
    (r"mlp\.router\.weight$", (None, "fsdp")),
    (r"mlp\.router\.bias$", (None,)),
    (r"self_attn\.sinks$", ("tensor",)),
)

SHARDING_RULES: dict[str, tuple[tuple[str, PartitionSpec], ...]] = {
    "qwen3": _DECODER_RULES,
    "llama": _DECODER_RULES,
    "gpt_oss": _EXPERT_RULES + _DECODER_RULES,
}
"""By ``model_type``: (pattern of the parameter's name, partition); the first match counts."""


def partition_of(model_type: str, name: str, shape: tuple[int, ...], mesh: MeshShape) -> PartitionSpec:
    """The partition of one parameter.

    A dimension that its axis does not divide stays whole: uneven shards would cost padding in every checkpoint.

    Raises:
        KeyError: the architecture's table does not name the parameter.
    """
    for pattern, spec in SHARDING_RULES[model_type]:
        if re.search(pattern, name):
            return tuple(
                axis if isinstance(axis, str) and size % getattr(mesh, axis) == 0 else None
                for axis, size in zip(spec, shape, strict=True)
            )
    raise KeyError(f"no sharding rule for parameter {name} of a {model_type} model")
