"""Packed rows, and the loss and gradients that plain transformers has for their sequences alone."""

from __future__ import annotations

import base64
import itertools
import re

import numpy as np
import torch
from torch import nn
from transformers import GptOssConfig, PreTrainedModel, Qwen3Config

from numina_finetune.config import RunConfig
from numina_finetune.models.lora import add_adapters, lora_config

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


def kernels_multiply_fp32(program: str) -> list[bool]:
    """Of each TPU kernel in a program's text, or in its serialized form: whether it multiplies fp32 in fp32."""
    bodies = re.findall(r'"body": ?"([A-Za-z0-9+/=]+)"', program)
    return [b"contract_precision<fp32>" in base64.b64decode(body) for body in bodies]


def qwen3_config(layers: int, *, tied: bool = True, windows: bool = True) -> Qwen3Config:
    """Small, with a window in every other layer."""
    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=tied,
        pad_token_id=0,
        use_sliding_window=windows,
        sliding_window=WINDOW,
        layer_types=(["sliding_attention", "full_attention"] if windows else ["full_attention"] * 2) * (layers // 2),
        use_cache=False,
    )


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


LORA = RunConfig(model_name="a-model", precision="fp32", lora_rank=4, lora_alpha=6)


def with_adapters(model: PreTrainedModel) -> dict[str, str]:
    """Give ``model`` adapters of which both matrices are random; PEFT's names of their parameters, by ours."""
    names = add_adapters(model, LORA)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in sorted(names):
            model.get_parameter(name).normal_(std=0.1, generator=generator)
    return names


def peft_reference(
    plain: PreTrainedModel, adapted: PreTrainedModel, names: dict[str, str], batch: Batch
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients that PEFT's own modules in ``plain`` have with the adapters of ``adapted``, by our names."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(lora_config(LORA, plain.config.model_type), plain)
    theirs = {name: re.sub(r"lora_([AB])\.", r"lora_\1.default.", peft_name) for name, peft_name in names.items()}
    with torch.no_grad():
        for name, peft_name in theirs.items():
            plain.get_parameter(peft_name).copy_(adapted.get_parameter(name))
    loss, gradients = reference(plain, batch)
    return loss, {name: gradients.pop(peft_name) for name, peft_name in theirs.items()} | gradients
