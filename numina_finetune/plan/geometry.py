"""The shapes of a model, known without its weights, and for the common ones without the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numina_finetune.config import ALIASES, RunConfig
from numina_finetune.errors import ConfigError

_QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "head_dim": 128,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
}
_LLAMA3: dict[str, Any] = {
    "model_type": "llama",
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
}
_GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "vocab_size": 201088,
    "max_position_embeddings": 131072,
    "rope_theta": 150000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "tie_word_embeddings": False,
}


def _shape(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


def _oss(layers: int, experts: int) -> dict[str, Any]:
    kinds = ["sliding_attention", "full_attention"]
    return {
        **_GPT_OSS,
        "num_hidden_layers": layers,
        "num_local_experts": experts,
        "layer_types": [kinds[layer % 2] for layer in range(layers)],
    }


def _llama_3_1(**shape: int) -> dict[str, Any]:
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    return {**_LLAMA3, **shape, "max_position_embeddings": 131072, "rope_scaling": scaling}


GEOMETRIES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-0.6B": {**_QWEN3, **_shape(1024, 3072, 28, 16), "tie_word_embeddings": True},
    "Qwen/Qwen3-1.7B": {**_QWEN3, **_shape(2048, 6144, 28, 16), "tie_word_embeddings": True},
    "Qwen/Qwen3-4B": {**_QWEN3, **_shape(2560, 9728, 36, 32), "tie_word_embeddings": True},
    "Qwen/Qwen3-8B": {**_QWEN3, **_shape(4096, 12288, 36, 32)},
    "Qwen/Qwen3-14B": {**_QWEN3, **_shape(5120, 17408, 40, 40)},
    "Qwen/Qwen3-32B": {**_QWEN3, **_shape(5120, 25600, 64, 64)},
    "meta-llama/Meta-Llama-3-8B": {**_LLAMA3, **_shape(4096, 14336, 32, 32), "max_position_embeddings": 8192},
    "meta-llama/Meta-Llama-3-70B": {**_LLAMA3, **_shape(8192, 28672, 80, 64), "max_position_embeddings": 8192},
    "meta-llama/Llama-3.1-8B": _llama_3_1(**_shape(4096, 14336, 32, 32)),
    "meta-llama/Llama-3.1-70B": _llama_3_1(**_shape(8192, 28672, 80, 64)),
    "openai/gpt-oss-20b": _oss(24, 32),
    "openai/gpt-oss-120b": _oss(36, 128),
}
"""What the hub's ``config.json`` of these models says that shapes depend on."""
GEOMETRIES |= {
    f"{name}-Base": {**geometry, "max_position_embeddings": 32768}
    for name, geometry in GEOMETRIES.items()
    if name.startswith("Qwen/") and not name.endswith("-32B")
}


def geometry_of(config: RunConfig) -> dict[str, Any]:
    """The model's configuration: of a folder, of the table, or of the hub, in this order.

    Raises:
        ConfigError: it is nowhere, or is of a kind that cannot be trained.
    """
    name = ALIASES.get(config.model_name, config.model_name)
    if Path(name).is_dir():
        geometry = _from_library(config)
    elif config.model_revision is None and _table_name(name) in GEOMETRIES:
        geometry = GEOMETRIES[_table_name(name)]
    else:
        geometry = _from_library(config)
    faults = _faults(config, geometry)
    if faults:
        raise ConfigError(faults)
    return geometry


def _table_name(name: str) -> str:
    """An instruction-tuned model has the geometry of what it was trained from."""
    return name.removesuffix("-Instruct")


def _from_library(config: RunConfig) -> dict[str, Any]:
    from transformers import AutoConfig

    from numina_finetune.models.builtin import BUILTIN, tiny_config
    from numina_finetune.models.hub import from_hub, resolve_name
    from numina_finetune.models.tokenizer import load_tokenizer

    name = resolve_name(config.model_name)
    if name in BUILTIN:
        found = tiny_config(name, load_tokenizer(config))
    else:
        found = from_hub(
            AutoConfig, name, "--model-name", trust=config.trust_remote_code, revision=config.model_revision
        )
    geometry: dict[str, Any] = found.to_dict()
    return {
        key: value for key, value in geometry.items() if key not in ("dtype", "torch_dtype", "transformers_version")
    }


def _faults(config: RunConfig, geometry: dict[str, Any]) -> list[str]:
    from numina_finetune.models.load import SUPPORTED_ARCHITECTURES

    faults, kind = [], geometry.get("model_type")
    if kind not in SUPPORTED_ARCHITECTURES:
        faults.append(
            f"--model-name {config.model_name} is a {kind} model: "
            f"use one of the architectures {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    longest = geometry.get("max_position_embeddings")
    if longest is not None and config.max_seq_length > longest:
        faults.append(
            f"--max-seq-length {config.max_seq_length} is more than {config.model_name} can take: use {longest} or less"
        )
    return faults
