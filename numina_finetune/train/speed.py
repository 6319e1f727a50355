"""How fast a run is, and how much of the chips' arithmetic that uses.

Model FLOPs utilisation is what the model needs, not what the program does: work done again (``--remat``) and padding
count as nothing. For each token that is not padding:

- **matrix products**: ``6 N``; N = the parameters that multiply a token: all of them, of experts those that a token is
  sent to, and not the input embedding, unless it is the output's too. 2 for a product and a sum, times 3 for the
  forward pass and the gradients by inputs and by weights.
  Frozen weights have no gradients: 2 times ``2 N``.
- **attention**: ``12 x heads x head_dim x keys`` a layer; keys = how many a token sees on average in a row of
  ``--max-seq-length`` that is one sequence, its own place included: ``(length + 1) / 2``, fewer within a window.

``mfu = tokens/s/chip x 6 N / peak``; ``mfu_with_attention`` has both in place of ``6 N``. Peak = a chip's bf16 rate as
its vendor gives it (`numina_finetune.tpu`); devices that are not in that table have no utilisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class TokenFlops:
    """What one token needs, forward and backward."""

    products: float
    attention: float


@dataclass(frozen=True)
class Chips:
    """What the run is measured against."""

    count: int
    peak_flops: float | None
    """Of one of them, a second; None where unknown."""


@dataclass
class Seconds:
    """Where the host's time went, over some optimizer steps."""

    input: float = 0.0
    """Building batches and sending them."""
    dispatch: float = 0.0
    """Tracing the step and handing it to the device; with eager execution, all of it."""
    wait: float = 0.0
    """Waiting for the device at the log line."""


def token_flops(model: PreTrainedModel, length: int) -> TokenFlops:
    """The FLOPs of one token in rows of ``length``; ``model`` still as it was loaded."""
    config = model.config
    share = _expert_share(config)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    products = sum(
        _products(parameter) * (share if ".experts." in name else 1.0) for name, parameter in model.named_parameters()
    )
    if head is None or head.weight is not embedding.weight:
        products -= _products(embedding.weight)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    attention = sum(
        12.0 * width * _mean_keys(length, window if kind == "sliding_attention" else None) for kind in kinds
    )
    return TokenFlops(products, attention)


def utilisation(flops: TokenFlops, tokens_per_second: float, chips: Chips) -> dict[str, float]:
    """``mfu`` and ``mfu_with_attention``; nothing where the chips' peak is unknown."""
    if not chips.peak_flops:
        return {}
    share = tokens_per_second / (chips.count * chips.peak_flops)
    return {
        "mfu": round(flops.products * share, 4),
        "mfu_with_attention": round((flops.products + flops.attention) * share, 4),
    }


def _products(parameter: torch.Tensor) -> float:
    """FLOPs of a token with it: forward, and the gradients by inputs and by itself."""
    return (6.0 if parameter.requires_grad else 4.0) * parameter.numel()


def _mean_keys(length: int, window: int | None) -> float:
    seen = length if window is None else min(window, length)
    return (seen * (seen + 1) / 2 + (length - seen) * seen) / length


def _expert_share(config: PretrainedConfig) -> float:
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return float(config.num_experts_per_tok) / experts if experts else 1.0
