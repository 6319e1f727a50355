"""A tokenizer and a model from the hub, a folder, or a built-in configuration."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import errors as hub_errors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from numina_finetune.config import ALIASES, RunConfig
from numina_finetune.errors import ConfigError
from numina_finetune.models.attention import SEGMENT_ATTENTION
from numina_finetune.models.builtin import BUILTIN, TINY_TOKENIZER, tiny_config
from numina_finetune.models.precision import WEIGHT_DTYPES

logger = logging.getLogger(__name__)

SUPPORTED_ARCHITECTURES = ("qwen3", "llama")
"""``model_type`` of the architectures whose layers, masks and sharding are known."""

_CONFIRMED_ABSENT = (
    hub_errors.RepositoryNotFoundError,
    hub_errors.RevisionNotFoundError,
    hub_errors.RemoteEntryNotFoundError,
    hub_errors.HFValidationError,
)


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of ``--tokenizer-name``, or of the model.

    Raises:
        ConfigError: it does not exist, or has neither a padding nor an end token.
    """
    name = resolve_name(config.tokenizer)
    if name in BUILTIN:
        return AutoTokenizer.from_pretrained(str(TINY_TOKENIZER))
    own = config.tokenizer_name is not None
    option, revision = ("--tokenizer-name", None) if own else ("--model-name", config.model_revision)
    tokenizer = _from_hub(AutoTokenizer, name, option, revision=revision)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            f"{option} {name} has a tokenizer with neither a padding nor an end token: use another tokenizer"
        )
    return tokenizer


def load_config(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The model's configuration, prepared for training: no cache, our attention.

    Raises:
        ConfigError: it does not exist, or the model cannot take this run's data; every such fault at once.
    """
    name = resolve_name(config.model_name)
    if name in BUILTIN:
        model_config: PretrainedConfig = tiny_config(name, tokenizer)
    else:
        model_config = _from_hub(AutoConfig, name, "--model-name", revision=config.model_revision)
    faults = _faults(config, model_config, tokenizer)
    if faults:
        raise ConfigError(faults)
    model_config.use_cache = False
    return model_config


def load_model(config: RunConfig, tokenizer: PreTrainedTokenizerBase, *, weights: bool = True) -> PreTrainedModel:
    """The model on the CPU, its weights in the master type of ``config.precision``.

    Args:
        weights: False leaves them uninitialised, for a resume that fills them from a checkpoint.
    """
    name, dtype = resolve_name(config.model_name), WEIGHT_DTYPES[config.precision]
    model_config = load_config(config, tokenizer)
    if name in BUILTIN:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return _from_config(model_config, dtype)
    if not weights:
        with no_init_weights():
            model = _from_config(model_config, dtype)
        model.tie_weights()  # left out along with the initialisation
        return model
    return _from_hub(
        AutoModelForCausalLM,
        name,
        "--model-name",
        revision=config.model_revision,
        config=model_config,
        dtype=dtype,
        attn_implementation=SEGMENT_ATTENTION,
    )


def resolve_name(name: str) -> str:
    """The hub's own name for what the user typed."""
    resolved = ALIASES.get(name, name)
    if resolved != name:
        logger.warning("%s is taken to mean %s", name, resolved)
    return resolved


def _from_config(model_config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(model_config, dtype=dtype, attn_implementation=SEGMENT_ATTENTION)


def _from_hub(auto: Any, name: str, option: str, **arguments: Any) -> Any:
    """``auto.from_pretrained``, with a confirmed absence as a ConfigError and a network fault left as it is."""
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ConfigError(f"{option} {name} is a path, and there is no such folder: give a folder or a hub name")
    try:
        return auto.from_pretrained(name, **arguments)
    except (OSError, ValueError) as error:
        if _is_confirmed_absence(error):
            raise ConfigError(f"{option} {name} was not found on the hub (or is private): check the name") from error
        if Path(name).is_dir():
            raise ConfigError(f"{option} {name} cannot be loaded from that folder: {error}") from error
        raise


def _is_confirmed_absence(error: BaseException) -> bool:
    """Whether the hub answered that there is no such thing, anywhere in the chain of causes."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, _CONFIRMED_ABSENT):
        cause = cause.__cause__ or cause.__context__
    return cause is not None


def _faults(config: RunConfig, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    name, faults = config.model_name, []
    if model_config.model_type not in SUPPORTED_ARCHITECTURES:
        faults.append(
            f"--model-name {name} is a {model_config.model_type} model: "
            f"use one of the architectures {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    longest = getattr(model_config, "max_position_embeddings", None)
    if longest is not None and config.max_seq_length > longest:
        faults.append(f"--max-seq-length {config.max_seq_length} is more than {name} can take: use {longest} or less")
    vocabulary = getattr(model_config, "vocab_size", None)
    if vocabulary is not None and len(tokenizer) > vocabulary:
        faults.append(
            f"--tokenizer-name {config.tokenizer} has {len(tokenizer)} tokens, but {name} embeds {vocabulary}: "
            "use the model's own tokenizer"
        )
    return faults
