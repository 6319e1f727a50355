"""Weights out of safetensors files into a model, a slice at a time.

A file is mapped into memory while one of its tensors is read, and then let go, so that besides the model itself there
are never more than one tensor's pages of the file and one slice in host memory.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from numina_finetune.errors import ConfigError
from numina_finetune.models.mxfp4 import dequantise

logger = logging.getLogger(__name__)

Files = Mapping[str, Path]
"""The file that holds a tensor, by the tensor's name in it."""
SLICE_BYTES = 2**26
"""About as much of a tensor is read at a time; at least one row."""
_BLOCKS, _SCALES = "_blocks", "_scales"


def find_weights(name: str, revision: str | None) -> Files | None:
    """The files with a model's weights: those in a folder, or downloaded from the hub where they are not here yet.

    Returns:
        None where the model has none in safetensors.
    """

    def find(file: str, *, needed: bool) -> Path | None:
        found = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=needed)
        return Path(found) if found else None

    if whole := find(SAFE_WEIGHTS_NAME, needed=False):
        with safe_open(whole, "pt") as opened:
            return dict.fromkeys(opened.keys(), whole)
    if not (index := find(SAFE_WEIGHTS_INDEX_NAME, needed=False)):
        return None
    named: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    paths = {file: find(file, needed=True) for file in sorted(set(named.values()))}
    return {tensor: path for tensor, file in named.items() if (path := paths[file]) is not None}


def fill(model: PreTrainedModel, files: Files) -> None:
    """Give ``model``, on the CPU, the values in ``files``, in the type that its parameters have.

    Raises:
        ConfigError: a parameter is not there, has another shape, or is tied to one with other values.
    """
    sources = _sources(model, files)
    total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    filled: set[int] = set()
    with (
        torch.no_grad(),
        tqdm(total=total, unit="B", unit_scale=True, desc="weights", leave=False, disable=None) as bar,
    ):
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name not in sources:  # tied to one that is there
                continue
            tied = id(parameter) in filled
            for rows, values in _slices(files, sources[name], tuple(parameter.shape)):
                target = parameter[rows] if parameter.ndim else parameter
                if tied:
                    _refuse_other(target, values, name)
                    continue
                target.copy_(values)
                bar.update(target.numel() * target.element_size())
            filled.add(id(parameter))


def _sources(model: PreTrainedModel, files: Files) -> dict[str, str]:
    """The stored name of each parameter that is there itself; of a quantised one, without ``_blocks``."""
    stored = {name.removesuffix(_BLOCKS) for name in files if not name.endswith(_SCALES)}
    prefix = f"{model.base_model_prefix}."
    sources: dict[str, str] = {}
    missing: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # A checkpoint of the decoder alone has no prefix.
        found = next((own for own in (name, name.removeprefix(prefix)) if own in stored), None)
        if found is not None:
            sources[name] = found
            missing[id(parameter)] = ""
        else:
            missing.setdefault(id(parameter), name)
    lacking = [name for name in missing.values() if name]
    if lacking:
        raise ConfigError(
            f"the files of {model.config.name_or_path} lack {len(lacking)} of the model's weights, such as "
            f"{lacking[0]}: give a whole model of this architecture"
        )
    if unused := sorted(stored - set(sources.values())):
        logger.info(
            "%d stored tensors are no weights of this model and are left out, such as %s", len(unused), unused[0]
        )
    return sources


def _slices(files: Files, name: str, shape: tuple[int, ...]) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of a parameter of ``shape``, one part after another, and their values."""
    if name in files:
        yield from _plain_slices(files[name], name, shape)
        return
    blocks_name, scales_name = name + _BLOCKS, name + _SCALES
    if scales_name not in files:
        raise ConfigError(f"{blocks_name} has no {scales_name} beside it: give a whole model")
    with safe_open(files[blocks_name], "pt") as blocks_file, safe_open(files[scales_name], "pt") as scales_file:
        blocks, scales = blocks_file.get_slice(blocks_name), scales_file.get_slice(scales_name)
        experts, out, groups, half = blocks.get_shape()
        _refuse_shape(name, (experts, groups * half * 2, out), shape)
        for expert in range(experts):
            values = dequantise(blocks[expert], scales[expert])
            yield slice(expert, expert + 1), values.T.unsqueeze(0)


def _plain_slices(path: Path, name: str, shape: tuple[int, ...]) -> Iterator[tuple[slice, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        stored = file.get_slice(name)
        _refuse_shape(name, tuple(stored.get_shape()), shape)
        if not shape:
            yield slice(None), file.get_tensor(name)
            return
        step = max(1, SLICE_BYTES // max(1, 4 * math.prod(shape[1:])))
        for first in range(0, shape[0], step):
            rows = slice(first, min(first + step, shape[0]))
            yield rows, stored[rows]


def _refuse_shape(name: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if stored != wanted:
        raise ConfigError(
            f"{name} is {list(stored)} in the model's files, {list(wanted)} by its config.json: give a whole model"
        )


def _refuse_other(filled: torch.Tensor, values: torch.Tensor, name: str) -> None:
    if not torch.equal(filled, values.to(filled.dtype)):
        raise ConfigError(
            f"config.json ties {name} to another weight, and the files give it values of its own: "
            "set tie_word_embeddings to false there"
        )
