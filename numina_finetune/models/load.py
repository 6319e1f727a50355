"""A model from the hub, a folder, or a built-in configuration."""

from __future__ import annotations

import logging

import torch
from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from numina_finetune.config import RunConfig
from numina_finetune.errors import ConfigError
from numina_finetune.models.attention import SEGMENT_ATTENTION, dropout_faults
from numina_finetune.models.builtin import BUILTIN, tiny_config
from numina_finetune.models.experts import STATIC_EXPERTS
from numina_finetune.models.hub import from_hub, is_staged, resolve_name
from numina_finetune.models.lora import add_adapters, lora_faults
from numina_finetune.models.mxfp4 import is_mxfp4
from numina_finetune.models.precision import COMPUTE_DTYPES, WEIGHT_DTYPES
from numina_finetune.models.stream import (
    Files,
    StoredWeights,
    Weights,
    fill,
    find_weights,
    fingerprint,
    staged_weights,
)
from numina_finetune.models.weights import ModelWeights, NamedWeights, StreamedWeights

logger = logging.getLogger(__name__)

SUPPORTED_ARCHITECTURES = ("qwen3", "llama", "gpt_oss")
"""``model_type`` of the architectures whose layers, masks and sharding are known."""


def load_config(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The model's configuration, prepared for training: no cache, our experts.

    Raises:
        ConfigError: it does not exist, or the model cannot take this run's data; every such fault at once.
    """
    name = resolve_name(config.model_name)
    if name in BUILTIN:
        model_config: PretrainedConfig = tiny_config(name, tokenizer)
    else:
        model_config = from_hub(
            AutoConfig, name, "--model-name", trust=config.trust_remote_code, revision=config.model_revision
        )
    faults = _faults(config, model_config, tokenizer)
    if faults:
        raise ConfigError(faults)
    if is_mxfp4(model_config):
        del model_config.quantization_config  # the weights are trained and exported as what they stand for
    model_config.use_cache = False
    if model_config.model_type == "gpt_oss":
        model_config._experts_implementation = STATIC_EXPERTS
    return model_config


def load_model(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model on the CPU, as :func:`open_model` describes it."""
    model, weights = open_model(config, tokenizer)
    fill(model, weights)
    return model


def open_model(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, *, weights: bool = True
) -> tuple[PreTrainedModel, Weights | None]:
    """The model as it is before it is given to devices, and where the values come from that it lacks.

    Args:
        weights: False where a checkpoint will give the trained values, and none of them are to be read. Frozen ones
            are in no checkpoint, and always read.

    Returns:
        Parameters in the master type of ``config.precision``, without values (``meta``), buffers with them; and the
        source of the values, None without ``weights``. With ``--lora-rank``, frozen parameters have the type that they
        are computed with, and the adapters, which are what is trained, have their first values. A built-in model, or
        one whose weights have another format than safetensors, is on the CPU with its values, and has no source.

    Raises:
        ConfigError: the model's files are not whole.
    """
    model_config = load_config(config, tokenizer)
    if not config.lora_rank:
        return _open_base(config, model_config, WEIGHT_DTYPES[config.precision], weights=weights)
    model, source = _open_base(config, model_config, COMPUTE_DTYPES[config.precision])
    add_adapters(model, config)
    return model, source


def blank_model(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The run's model, adapters included, without any values: for its shapes. Nothing of its weights is read."""
    model_config = load_config(config, tokenizer)
    with torch.device("meta"):
        model = _from_config(config, model_config, WEIGHT_DTYPES[config.precision])
        if config.lora_rank:
            add_adapters(model, config, values=False)
    return model


def base_weights(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> NamedWeights:
    """The frozen weights of a run with adapters, as it computes with them, read one at a time where that can be."""
    model, source = _open_base(config, load_config(config, tokenizer), COMPUTE_DTYPES[config.precision])
    return ModelWeights(model) if source is None else StreamedWeights(model, source)


def base_fingerprint(config: RunConfig) -> str | None:
    """Tells whether the frozen weights of a run with adapters are those that it began with.

    Returns:
        None where there is nothing to tell: all weights are trained, or they are made from the seed, or their files
        cannot be read in part.
    """
    return weights_fingerprint(config) if config.lora_rank else None


def weights_fingerprint(config: RunConfig) -> str | None:
    """Tells the model's weights from others; None where they are made from the seed, or can only be read whole."""
    if (name := resolve_name(config.model_name)) in BUILTIN:
        return None
    files = _find_weights(config, name)
    return None if files is None else fingerprint(files)


def _open_base(
    config: RunConfig, model_config: PretrainedConfig, dtype: torch.dtype, *, weights: bool = True
) -> tuple[PreTrainedModel, Weights | None]:
    name = resolve_name(config.model_name)
    if name in BUILTIN:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return _from_config(config, model_config, dtype), None
    files = _find_weights(config, name) if weights else {}
    if files is not None:
        with no_init_weights(), init_empty_weights(include_buffers=False):
            model = _from_config(config, model_config, dtype).eval()
        model.tie_weights()  # left out along with the initialisation
        return model, StoredWeights(model, files) if weights else None
    whole: PreTrainedModel = from_hub(  # weights in another format than safetensors
        AutoModelForCausalLM,
        name,
        "--model-name",
        trust=config.trust_remote_code,
        revision=config.model_revision,
        config=model_config,
        dtype=dtype,
        attn_implementation=SEGMENT_ATTENTION,
    )
    return whole, None


def _find_weights(config: RunConfig, name: str) -> Files | None:
    if is_staged(config.model_name):
        return staged_weights(config.model_name)
    return find_weights(name, config.model_revision)


def load_generation_config(config: RunConfig, model_config: PretrainedConfig) -> GenerationConfig:
    """The model's own, or, where it has none, one derived from its configuration."""
    name = resolve_name(config.model_name)
    if name not in BUILTIN:
        try:
            return GenerationConfig.from_pretrained(name, revision=config.model_revision)
        except OSError:
            logger.info("%s has no generation configuration: derived from its model configuration", name)
    return GenerationConfig.from_model_config(model_config)


def _from_config(config: RunConfig, model_config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(
        model_config, dtype=dtype, attn_implementation=SEGMENT_ATTENTION, trust_remote_code=config.trust_remote_code
    )


def _faults(config: RunConfig, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    name, faults = config.model_name, []
    if model_config.model_type not in SUPPORTED_ARCHITECTURES:
        faults.append(
            f"--model-name {name} is a {model_config.model_type} model: "
            f"use one of the architectures {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    if getattr(model_config, "quantization_config", None) and not is_mxfp4(model_config):
        faults.append(f"--model-name {name} has quantised weights: give the model they were made from")
    longest = getattr(model_config, "max_position_embeddings", None)
    if longest is not None and config.max_seq_length > longest:
        faults.append(f"--max-seq-length {config.max_seq_length} is more than {name} can take: use {longest} or less")
    vocabulary = getattr(model_config, "vocab_size", None)
    if vocabulary is not None and len(tokenizer) > vocabulary:
        faults.append(
            f"--tokenizer-name {config.tokenizer} has {len(tokenizer)} tokens, but {name} embeds {vocabulary}: "
            "use the model's own tokenizer"
        )
    if config.attention == "splash":
        faults += [f"--attention splash: {fault}" for fault in dropout_faults(model_config)]
    return [*faults, *lora_faults(config, model_config.model_type)]
