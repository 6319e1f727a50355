"""From a checkpoint to a plain Hugging Face folder, on a CPU, whatever mesh or backend wrote the checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from numina_finetune import storage
from numina_finetune.checkpoint.shards import load_shards

logger = logging.getLogger(__name__)

_MODEL = "model."
"""Where a checkpoint keeps the weights; the optimizer lies beside it."""
MAX_SHARD = "5GB"


def export_model(
    state: Path,
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
        state: a checkpoint's folder of shards, written by ``torch.distributed.checkpoint``.
        card: the model card, Markdown.
        dtype: of the weights written.
    """
    building = destination.with_name(f".{destination.name}.building")
    storage.remove_folder(building)
    building.mkdir(parents=True)
    _write_weights(state, building, dtype)
    config.use_cache = True
    config.dtype = dtype
    config.save_pretrained(building)
    generation.save_pretrained(building)
    tokenizer.save_pretrained(building)
    (building / "README.md").write_text(card, encoding="utf-8")
    storage.remove_folder(destination)
    building.rename(destination)
    storage.sync_folder(destination.parent)
    logger.info("exported the model to %s", destination)


def read_weight(state: Path, name: str) -> torch.Tensor:
    """One whole weight out of a checkpoint's shards, by Hugging Face name."""
    return _read(state, name, _shapes(state)[name])


def weight_names(state: Path) -> list[str]:
    """Hugging Face names of the weights in a checkpoint's shards."""
    return list(_shapes(state))


def _write_weights(state: Path, folder: Path, dtype: torch.dtype) -> None:
    """Shard by shard, so that no more than one output file is ever in memory."""
    shapes = _shapes(state)
    planned = {name: torch.empty(meta.size, dtype=dtype, device="meta") for name, meta in shapes.items()}
    split = split_torch_state_dict_into_shards(planned, max_shard_size=MAX_SHARD)
    for filename, names in split.filename_to_tensors.items():
        tensors = {name: _read(state, name, shapes[name]).to(dtype).contiguous() for name in names}
        save_file(tensors, folder / filename, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        storage.write_json(folder / "model.safetensors.index.json", index)


def _shapes(state: Path) -> Mapping[str, TensorStorageMetadata]:
    metadata = FileSystemReader(state).read_metadata().state_dict_metadata
    return {
        key.removeprefix(_MODEL): meta
        for key, meta in sorted(metadata.items())
        if key.startswith(_MODEL) and isinstance(meta, TensorStorageMetadata)
    }


def _read(state: Path, name: str, meta: TensorStorageMetadata) -> torch.Tensor:
    tensor = torch.empty(meta.size, dtype=meta.properties.dtype)
    load_shards({_MODEL + name: tensor}, state, alone=True)
    return tensor
