"""From a checkpoint to a plain Hugging Face folder, on a CPU, whatever mesh or backend wrote the checkpoint.

A run with adapters has two of them: the model with its adapters merged into it, or the adapters alone, as PEFT opens
them on top of the model that the run began from.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from numina_finetune import storage
from numina_finetune.checkpoint.shards import ShardReader
from numina_finetune.config import RunConfig
from numina_finetune.errors import CheckpointError
from numina_finetune.models.load import base_weights
from numina_finetune.models.lora import add_adapters, lora_config
from numina_finetune.models.ranges import LENGTH_BYTES, STORED_TYPES
from numina_finetune.models.weights import CheckpointWeights, MergedWeights, NamedWeights

logger = logging.getLogger(__name__)

MAX_SHARD = "5GB"
_ALIGNMENT = 8
"""Of the first tensor in a file, as the format's own writer has it."""
_CAST = 2**24
"""Values that are cast to the written type at a time."""


def trained_weights(
    shards: ShardReader, config: RunConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> NamedWeights:
    """The model that a checkpoint of the run stands for: its weights, or the frozen ones with the adapters merged in.

    Args:
        dtype: that merged weights are cast to, once.

    Raises:
        ConfigError: the model that the run began from is no longer there.
    """
    trained = CheckpointWeights(shards)
    if not config.lora_rank:
        return trained
    return MergedWeights(base_weights(config, tokenizer), trained, config.lora_scale, dtype)


def export_model(
    weights: NamedWeights,
    destination: Path,
    *,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig,
    card: str,
    dtype: torch.dtype,
) -> None:
    """Write ``destination`` so that ``AutoModelForCausalLM.from_pretrained`` opens it; whole or not at all.

    Args:
        weights: those of the model, by Hugging Face name.
        card: the model card, Markdown.
        dtype: of the weights written.
    """
    with _building(destination) as folder:
        _write_weights(weights, folder, dtype)
        config.use_cache = True
        config.dtype = dtype
        config.save_pretrained(folder)
        generation.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
    logger.info("exported the model to %s", destination)


def export_adapter(
    shards: ShardReader,
    destination: Path,
    *,
    run: RunConfig,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
) -> None:
    """Write ``destination`` so that ``PeftModel.from_pretrained(base, destination)`` opens it; whole or not at all.

    Args:
        shards: a checkpoint's, of a run with adapters.
        config: of the model.
        card: the model card, Markdown.
    """
    trained = CheckpointWeights(shards)
    with _building(destination) as folder:
        tensors = {
            f"base_model.model.{theirs}": finite(ours, trained.read(ours))
            for ours, theirs in _peft_names(run, config).items()
        }
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        described = lora_config(run, config.model_type)
        described.inference_mode = True
        described.save_pretrained(str(folder))
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
    logger.info("exported the adapter to %s", destination)


@contextmanager
def _building(destination: Path) -> Iterator[Path]:
    """A folder beside ``destination`` that takes its place in the end."""
    building = destination.with_name(f".{destination.name}.building")
    storage.remove_folder(building)
    building.mkdir(parents=True)
    yield building
    storage.remove_folder(destination)
    building.rename(destination)
    storage.sync_folder(destination.parent)


def _peft_names(run: RunConfig, config: PretrainedConfig) -> dict[str, str]:
    """PEFT's names of the adapters' parameters, by ours: asked of PEFT itself, on a model without values."""
    with torch.device("meta"):
        return add_adapters(AutoModelForCausalLM.from_config(config), run, values=False)


def _write_weights(weights: NamedWeights, folder: Path, dtype: torch.dtype) -> None:
    """Tensor by tensor, so that no more than one is ever in memory."""
    planned = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in sorted(weights.shapes.items())}
    split = split_torch_state_dict_into_shards(planned, max_shard_size=MAX_SHARD)
    for filename, names in split.filename_to_tensors.items():
        _write_file(folder / filename, {name: planned[name] for name in names}, weights.read)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        storage.write_json(folder / "model.safetensors.index.json", index)


def _write_file(path: Path, planned: Mapping[str, torch.Tensor], read: Callable[[str], torch.Tensor]) -> None:
    """Write a safetensors file (see `numina_finetune.models.ranges`), durably.

    Args:
        planned: shape and type of each tensor, by name.
        read: gives a tensor, of any type; it is written before the next one is asked for.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, like in planned.items():
        start, end = end, end + like.nbytes
        told = {"dtype": STORED_TYPES[like.dtype], "shape": list(like.shape), "data_offsets": [start, end]}
        header[name] = told
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        for name, like in planned.items():
            _write_tensor(file, finite(name, read(name)), like.dtype)
        file.flush()
        os.fsync(file.fileno())


def finite(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as it is.

    Raises:
        CheckpointError: it has values that are not finite, which nobody can use.
    """
    if not all(bool(torch.isfinite(part).all()) for part in torch.split(tensor.reshape(-1), _CAST)):
        raise CheckpointError(
            f"{name} has values that are not finite, and is not exported: the training diverged; take an earlier "
            "checkpoint (numina-finetune checkpoints list, export --step)"
        )
    return tensor


def _write_tensor(file: BinaryIO, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    for part in torch.split(tensor.reshape(-1), _CAST):
        file.write(part.to(dtype).view(torch.uint8).numpy().data)
