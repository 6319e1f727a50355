"""Small models, and what transformers' own ``generate`` says with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from numina_finetune.models.experts import STATIC_EXPERTS
from tests.reference import fill_randomly, gpt_oss_config, qwen3_config

PAD = 0
PROMPTS = [[5, 9, 23], [7], list(range(40, 60)), [60, 2, 60, 2], list(range(100, 231)), [11, 12], [11, 12, 13]]
"""Of mixed lengths, one of them longer than 128; most are longer than the models' windows."""
NEW_TOKENS = 40
TIE = 1e-4
"""Logits that are closer than this may change places by rounding."""


def decoded_model(name: str, layers: int = 4) -> PreTrainedModel:
    """``qwen3`` (tied head), ``qwen3-windows`` (its own head, every other layer with a window) or ``gpt-oss``."""
    windows = name == "qwen3-windows"
    config = gpt_oss_config(8, layers) if name == "gpt-oss" else qwen3_config(layers, tied=not windows, windows=windows)
    experts = {"experts_implementation": STATIC_EXPERTS} if name == "gpt-oss" else {}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **experts)
    fill_randomly(model)
    return model.eval()


def generated(
    model: PreTrainedModel, prompts: Sequence[list[int]], new_tokens: int, stop_ids: Sequence[int] = ()
) -> list[list[int]]:
    """transformers' greedy tokens for each prompt alone, by its own attention."""
    model.set_attn_implementation("eager")
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            eos_token_id=list(stop_ids) or None,
            pad_token_id=PAD,
        )
        found.append(output[0, len(prompt) :].tolist())
    return found


def gaps(
    model: PreTrainedModel, prompts: Sequence[list[int]], ours: Sequence[list[int]], theirs: Sequence[list[int]]
) -> list[float]:
    """For each row that goes another way: by how much the likeliest token led where it does."""
    found = []
    for prompt, own, other in zip(prompts, ours, theirs, strict=True):
        if own == other:
            continue
        place = next((n for n, pair in enumerate(zip(own, other, strict=False)) if pair[0] != pair[1]), None)
        if place is None:  # one goes on where the other ends
            found.append(float("inf"))
            continue
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + other[:place]])).logits[0, -1]
        first, second = logits.topk(2).values.tolist()
        found.append(first - second)
    return found
