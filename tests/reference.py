"""Packed rows, and the loss and gradients that plain transformers has for their sequences alone."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import nn
from transformers import GptOssConfig, PreTrainedModel

ROWS, LENGTH, WINDOW, VOCABULARY = 8, 128, 9, 320
SEGMENTS = (0, 50, 113, 120)
"""Where packed sequences begin; the last part is padding."""
Batch = dict[str, torch.Tensor]


def packed_rows() -> Batch:
    rng = np.random.default_rng(0)
    ids = rng.integers(1, VOCABULARY, (ROWS, LENGTH))
    labels = np.concatenate([ids[:, 1:], np.full((ROWS, 1), -100)], axis=1)
    segments, positions = np.zeros_like(ids), np.zeros_like(ids)
    for number, (start, end) in enumerate(zip(SEGMENTS, (*SEGMENTS[1:], LENGTH), strict=True)):
        segments[:, start:end] = number + 1
        positions[:, start:end] = np.arange(end - start)
        labels[:, end - 1] = -100
    segments[:, SEGMENTS[-1] :] = 0
    labels[:, SEGMENTS[-1] :] = -100
    labels[2] = -100
    named = {"input_ids": ids, "labels": labels, "segment_ids": segments, "position_ids": positions}
    return {name: torch.from_numpy(array.astype(np.int32)) for name, array in named.items()}


def reference(model: PreTrainedModel, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by transformers' own attention and experts, each packed sequence as a row of its own."""
    if model.config.model_type == "gpt_oss":
        model.set_attn_implementation("eager")
        model.set_experts_implementation("eager")
    else:
        model.set_attn_implementation("sdpa")
    total = torch.zeros((), dtype=model.dtype)
    for start, end in itertools.pairwise(SEGMENTS):
        ids, labels = batch["input_ids"][:, start:end].long(), batch["labels"][:, start:end].long()
        logits = model(input_ids=ids).logits
        total = total + nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.autograd.backward(total)
    return total.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def gpt_oss_config(experts: int, layers: int = 2) -> GptOssConfig:
    """Small, with a window and a limit on the gates that both cut something off."""
    return GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=experts,
        num_experts_per_tok=4,
        sliding_window=WINDOW,
        swiglu_limit=1.0,
        max_position_embeddings=4096,
        pad_token_id=0,
        use_cache=False,
    )


def fill_randomly(model: nn.Module) -> None:
    """Every weight, those too that begin as zeros or ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(std=0.5 if "router" in name or "sinks" in name else 0.1, generator=generator)
