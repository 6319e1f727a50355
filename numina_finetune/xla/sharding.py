"""Which mesh axes split which dimension of which parameter, by name, for each architecture.

A linear layer's weight is ``[out, in]``. Megatron's scheme over ``tensor``: the first matrix of a pair splits its
outputs, the second its inputs; ``fsdp`` and ``expert`` together take the other dimension. Experts' weights are split by
expert over ``expert``, and by row over ``fsdp`` alone.
"""

from __future__ import annotations

import math
import re

from numina_finetune.config import SHARD_AXES
from numina_finetune.mesh import MeshShape
from numina_finetune.models.lora import adapted_weight

Axes = str | tuple[str, ...] | None
PartitionSpec = tuple[Axes, ...]

_DECODER_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embed_tokens\.weight$", ("tensor", SHARD_AXES)),
    (r"lm_head\.weight$", ("tensor", SHARD_AXES)),
    (r"self_attn\.[qkv]_proj\.weight$", ("tensor", SHARD_AXES)),
    (r"self_attn\.[qkv]_proj\.bias$", ("tensor",)),
    (r"self_attn\.o_proj\.weight$", (SHARD_AXES, "tensor")),
    (r"self_attn\.o_proj\.bias$", (None,)),
    (r"mlp\.(gate|up)_proj\.weight$", ("tensor", SHARD_AXES)),
    (r"mlp\.(gate|up)_proj\.bias$", ("tensor",)),
    (r"mlp\.down_proj\.weight$", (SHARD_AXES, "tensor")),
    (r"mlp\.down_proj\.bias$", (None,)),
    (r"norm\.weight$", (None,)),
)

_EXPERT_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    # [experts, in, out]. Gate and up are neighbours, so that any even part of them is whole pairs.
    (r"experts\.gate_up_proj$", ("expert", "fsdp", "tensor")),
    (r"experts\.gate_up_proj_bias$", ("expert", "tensor")),
    (r"experts\.down_proj$", ("expert", "tensor", "fsdp")),
    (r"experts\.down_proj_bias$", ("expert", None)),
    (r"mlp\.router\.weight$", (None, SHARD_AXES)),
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

    A dimension that its axes do not divide is split over the first of them, or stays whole: uneven shards would cost
    padding in every checkpoint.

    Raises:
        KeyError: the architecture's table does not name the parameter.
    """
    spec = _rule_of(model_type, name)
    return tuple(axes_that_divide(entry, size, mesh) for entry, size in zip(spec, shape, strict=True))


def _rule_of(model_type: str, name: str) -> PartitionSpec:
    if adapted := adapted_weight(name):
        return _adapter_rule(_rule_of(model_type, adapted[0]), adapted[1])
    for pattern, spec in SHARDING_RULES[model_type]:
        if re.search(pattern, name):
            return spec
    raise KeyError(f"no sharding rule for parameter {name} of a {model_type} model")


def _adapter_rule(weight: PartitionSpec, which: str) -> PartitionSpec:
    """An adapter's matrices lie as the weight that they adapt: A ``[rank, in]`` like its inputs, B ``[out, rank]`` like
    its outputs.

    Of experts, A is ``[experts · rank, in]``, so that a part of it is whole experts. B is ``[out, rank · experts]``:
    each expert is spread over all of it, and it is split as the weight's inputs are for the sake of memory alone.
    """
    if len(weight) == 2:
        outputs, inputs = weight
        return (None, inputs) if which == "A" else (outputs, None)
    experts, inputs, outputs = weight
    return (experts, inputs) if which == "A" else (outputs, inputs)


def whole(spec: PartitionSpec) -> PartitionSpec:
    """The partition of a weight that is gathered for its product: over the axes that split weights it is whole."""
    return tuple(None if axes in (SHARD_AXES, "fsdp") else axes for axes in spec)


def is_of_experts(name: str) -> bool:
    """Whether a parameter is one of the weights of a layer's experts."""
    return re.search(r"\.experts\.\w+$", name) is not None


def axes_that_divide(entry: Axes, size: int, mesh: MeshShape) -> Axes:
    """Those of ``entry`` over which a dimension of ``size`` can be split evenly: all, the first of them, or None."""
    if isinstance(entry, tuple):
        whole = math.prod(getattr(mesh, axis) for axis in entry)
        return entry if size % whole == 0 else axes_that_divide(entry[0], size, mesh)
    return entry if entry is not None and size % getattr(mesh, entry) == 0 else None
