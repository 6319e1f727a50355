"""From a checkpoint to a plain Hugging Face folder, on a CPU, whatever mesh or backend wrote the checkpoint."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from numina_finetune import storage
from numina_finetune.checkpoint.shards import ShardReader
from numina_finetune.models.ranges import LENGTH_BYTES, STORED_TYPES

logger = logging.getLogger(__name__)

_MODEL = "model."
"""Where a checkpoint keeps the weights; the optimizer lies beside it."""
MAX_SHARD = "5GB"
_ALIGNMENT = 8
"""Of the first tensor in a file, as the format's own writer has it."""
_CAST = 2**24
"""Values that are cast to the written type at a time."""


def export_model(
    shards: ShardReader,
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
        shards: a checkpoint's.
        card: the model card, Markdown.
        dtype: of the weights written.
    """
    building = destination.with_name(f".{destination.name}.building")
    storage.remove_folder(building)
    building.mkdir(parents=True)
    _write_weights(shards, building, dtype)
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


def read_weight(shards: ShardReader, name: str) -> torch.Tensor:
    """One whole weight out of a checkpoint's shards, by Hugging Face name."""
    return shards.read(_MODEL + name)


def weight_shapes(shards: ShardReader) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights in a checkpoint's shards, by Hugging Face name."""
    found = sorted((name, shape) for name, (shape, _) in shards.tensors.items() if name.startswith(_MODEL))
    return {name.removeprefix(_MODEL): shape for name, shape in found}


def _write_weights(shards: ShardReader, folder: Path, dtype: torch.dtype) -> None:
    """Tensor by tensor, so that no more than one is ever in memory."""
    planned = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in weight_shapes(shards).items()}
    split = split_torch_state_dict_into_shards(planned, max_shard_size=MAX_SHARD)
    for filename, names in split.filename_to_tensors.items():
        _write_file(folder / filename, {name: planned[name] for name in names}, lambda name: read_weight(shards, name))
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
            _write_tensor(file, read(name), like.dtype)
        file.flush()
        os.fsync(file.fileno())


def _write_tensor(file: BinaryIO, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    for part in torch.split(tensor.reshape(-1), _CAST):
        file.write(part.to(dtype).view(torch.uint8).numpy().data)
