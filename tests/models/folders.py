"""Folders with small random models, as they are released."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen3Config

from tests.reference import gpt_oss_config

DENSE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
CONFIGS = {
    "qwen3, tied": Qwen3Config(**DENSE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**DENSE, tie_word_embeddings=False),
    "llama": LlamaConfig(**DENSE, tie_word_embeddings=False),
    "gpt-oss": gpt_oss_config(8),
}


def save(config: PretrainedConfig, folder: Path, **options: Any) -> PreTrainedModel:
    """A model with random weights, in a folder; of a vocabulary that the embedded tokenizer fits."""
    torch.manual_seed(0)
    config.vocab_size = 1024
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, **options)
    return model


def quantise_randomly(folder: Path) -> None:
    """Put random packed experts in place of the model's own, as gpt-oss is released."""
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, out = weights.pop(name).shape
        packed, shared = (experts, out, inner // 32, 16), (experts, out, inner // 32)
        weights[f"{name}_blocks"] = torch.randint(0, 256, packed, generator=generator, dtype=torch.uint8)
        weights[f"{name}_scales"] = torch.randint(110, 130, shared, generator=generator, dtype=torch.uint8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
