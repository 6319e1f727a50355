"""Weights out of safetensors files, a part at a time: into a model on the CPU, or into the shards that devices hold.

What is asked for is read in slices of a tensor, several at a time, so that besides the tensors that are filled only
those slices are in host memory. Parts that overlap, as those of devices that hold the same shard do, are read once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from numina_finetune.checkpoint.parallel import in_order
from numina_finetune.errors import ConfigError
from numina_finetune.models.mxfp4 import GROUP, dequantise
from numina_finetune.models.ranges import LocalBytes, Part, TensorFile
from numina_finetune.models.staged import open_staged

logger = logging.getLogger(__name__)

Files = Mapping[str, TensorFile]
"""The file that holds a tensor, by the tensor's name in it."""
SLICE_BYTES = 2**24
"""About as much of a stored tensor is read at a time; at least one row."""
DEQUANTISED = 2**21
"""Values that are made of a quantised slice at a time; at least one row's."""
READERS = 8
"""Slices on their way at a time."""
_BLOCKS, _SCALES = "_blocks", "_scales"
_SAMPLES, _SAMPLE_BYTES = 256, 2**12
"""Of a model's files, for their fingerprint."""


@dataclass(frozen=True)
class Wanted:
    """A part of a parameter, and where its values go."""

    name: str
    """The parameter's Hugging Face name."""
    part: Part
    target: torch.Tensor
    """On the CPU, of the part's shape; values are cast to its type."""


class Weights(Protocol):
    """Where a model's values come from."""

    def read(self, wanted: Sequence[Wanted], told: Callable[[int], object] = ...) -> None:
        """Fill the targets.

        Args:
            told: is called with the bytes of the targets that have been filled, as they are.

        Raises:
            ConfigError: the values are not there, whole.
        """


def find_weights(name: str, revision: str | None) -> Files | None:
    """The files with a model's weights: those in a folder, or downloaded from the hub where they are not here yet.

    Returns:
        None where the model has none in safetensors.
    """

    def find(file: str, *, needed: bool) -> Path | None:
        found = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=needed)
        return Path(found) if found else None

    if whole := find(SAFE_WEIGHTS_NAME, needed=False):
        return _of_one_file(TensorFile(LocalBytes(whole)))
    if not (index := find(SAFE_WEIGHTS_INDEX_NAME, needed=False)):
        return None
    named = _weight_map(index.read_text(encoding="utf-8"))
    paths = {file: find(file, needed=True) for file in sorted(set(named.values()))}
    opened = {file: TensorFile(LocalBytes(path)) for file, path in paths.items() if path is not None}
    return {tensor: opened[file] for tensor, file in named.items()}


def fingerprint(files: Files) -> str:
    """Tells one model's weights from another's: names, types, shapes, and bytes from everywhere in each file.

    Not all bytes: those of a large model take minutes. Training changes every weight a little, so that a few thousand
    of them tell.
    """
    digest = hashlib.sha256()
    everyone = sorted(set(files.values()), key=lambda file: file.name)
    for file in everyone:
        for sample in file.samples(max(1, _SAMPLES // len(everyone)), _SAMPLE_BYTES):
            digest.update(sample)
    return digest.hexdigest()[:16]


def staged_weights(url: str) -> Files:
    """The files with the weights of a model that is staged in a store, to be read there.

    Raises:
        ConfigError: there is no staged model, or its weights are not what was staged.
    """
    staged = open_staged(url)
    opened = {name: TensorFile(file) for name, file in staged.weights().items()}
    if SAFE_WEIGHTS_NAME in opened:
        return _of_one_file(opened[SAFE_WEIGHTS_NAME])
    named = _weight_map(staged.store.read(SAFE_WEIGHTS_INDEX_NAME).decode())
    return {tensor: opened[file] for tensor, file in named.items()}


def fill(model: nn.Module, weights: Weights | None) -> None:
    """Give the parameters of ``model`` that have no values (``meta``) memory on the CPU, and their values there.

    Args:
        weights: None leaves the values open.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    wanted = []
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if not parameter.is_meta:
            continue
        if parameter not in made:
            values = torch.empty_like(parameter, device="cpu", requires_grad=False)
            made[parameter] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            wanted.append(Wanted(name, whole(parameter.shape), values))
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, made[parameter])
    if weights is not None:
        with progress([one.target for one in wanted]) as told:
            weights.read(wanted, told)


@contextmanager
def progress(tensors: Iterable[torch.Tensor]) -> Iterator[Callable[[int], object]]:
    """A bar for the bytes of these tensors; gives what takes the bytes that have come."""
    total = sum(tensor.nbytes for tensor in tensors)
    with tqdm(total=total, unit="B", unit_scale=True, desc="weights", leave=False, disable=None) as bar:
        yield bar.update


def whole(shape: Sequence[int]) -> Part:
    """All of a tensor."""
    return tuple(slice(0, size) for size in shape)


class StoredWeights:
    """The weights in a model's files; implements `Weights`."""

    def __init__(self, model: PreTrainedModel, files: Files) -> None:
        """
        Args:
            model: whose parameters are to be found; it may be without values.

        Raises:
            ConfigError: a parameter is not there, or has another shape.
        """
        sources = _sources(model, files)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        own: dict[nn.Parameter, list[_Form]] = {}
        for name, source in sources.items():
            own.setdefault(parameters[name], []).append(_form(files, source, tuple(parameters[name].shape)))
        self._forms = {name: own[parameter] for name, parameter in parameters.items()}

    def read(self, wanted: Sequence[Wanted], told: Callable[[int], object] = lambda count: None) -> None:
        """See `Weights`.

        Raises:
            ConfigError: the values are not there, whole; or a parameter is tied to one with other values.
        """
        by_name: dict[str, list[Wanted]] = {}
        for one in wanted:
            by_name.setdefault(one.name, []).append(one)
        spans = [(name, span) for name, parts in by_name.items() for span in _spans(self._forms[name][0], parts)]

        def fetch(task: tuple[str, Part]) -> list[_Raw]:
            name, span = task
            return [form.fetch(span) for form in self._forms[name]]

        for (name, span), raws in zip(spans, in_order(fetch, spans, threads=READERS, ahead=READERS), strict=True):
            told(_distribute(self._forms[name], raws, span, by_name[name]))


# --- how a parameter is stored ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plain:
    """A parameter that is stored as it is."""

    name: str
    shape: tuple[int, ...]
    """The parameter's."""
    file: TensorFile

    @property
    def row_bytes(self) -> int:
        """Stored bytes for one index of the first dimension."""
        return math.prod(self.shape[1:]) * self.file.item_bytes(self.name)

    def fetch(self, part: Part) -> _Raw:
        """What is stored of the part."""
        return (self.file.read(self.name, part),)

    def values(self, part: Part, raw: _Raw) -> Iterator[tuple[Part, torch.Tensor]]:
        """The part's values, in pieces: each with its place in the parameter."""
        yield part, raw[0]


@dataclass(frozen=True)
class _Quantised:
    """MXFP4 experts, see `numina_finetune.models.mxfp4`; the interface is `_Plain`'s.

    Only the groups that a part touches are dequantised.
    """

    name: str
    shape: tuple[int, ...]
    blocks: TensorFile
    scales: TensorFile

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) // 2

    def fetch(self, part: Part) -> _Raw:
        experts, inner, out = part
        groups = _groups(inner)
        blocks = self.blocks.read(self.name + _BLOCKS, (experts, out, groups, slice(0, GROUP // 2)))
        return blocks, self.scales.read(self.name + _SCALES, (experts, out, groups))

    def values(self, part: Part, raw: _Raw) -> Iterator[tuple[Part, torch.Tensor]]:
        (experts, inner, out), (blocks, scales) = part, raw
        cut = slice(inner.start % GROUP, inner.start % GROUP + inner.stop - inner.start)
        step = max(1, DEQUANTISED // max(1, blocks[:, :1].numel() * 2))
        for first in range(0, out.stop - out.start, step):
            some = slice(first, first + step)
            found = dequantise(blocks[:, some], scales[:, some])[..., cut].transpose(1, 2)
            begin = out.start + first
            yield (experts, inner, slice(begin, begin + found.shape[2])), found


def _groups(inner: slice) -> slice:
    """The quantised groups that hold these values."""
    return slice(inner.start // GROUP, -(-inner.stop // GROUP))


_Form = _Plain | _Quantised
_Raw = tuple[torch.Tensor, ...]
"""Stored values of a part: as they are, or blocks and scales."""


def _form(files: Files, name: str, shape: tuple[int, ...]) -> _Form:
    """How the parameter is stored that has ``shape`` in the model.

    Raises:
        ConfigError: with another shape, or not whole.
    """
    if name in files:
        _refuse_shape(name, files[name].shape(name), shape)
        return _Plain(name, shape, files[name])
    blocks, scales = name + _BLOCKS, name + _SCALES
    if scales not in files:
        raise ConfigError(f"{blocks} has no {scales} beside it: give a whole model")
    experts, out, groups, half = files[blocks].shape(blocks)
    _refuse_shape(name, (experts, groups * half * 2, out), shape)
    _refuse_shape(scales, files[scales].shape(scales), (experts, out, groups))
    return _Quantised(name, shape, files[blocks], files[scales])


def _spans(form: _Form, parts: Sequence[Wanted]) -> Iterator[Part]:
    """What is to be read for these parts, one slice of the first dimension after another."""
    if not form.shape:
        yield ()
        return
    step = max(1, SLICE_BYTES // max(1, form.row_bytes))
    end = max(one.part[0].stop for one in parts)
    for first in range(min(one.part[0].start for one in parts), end, step):
        rows = slice(first, min(first + step, end))
        touched = [part for one in parts if not _is_empty(part := (_common(one.part[0], rows), *one.part[1:]))]
        if touched:
            yield tuple(
                slice(min(one.start for one in along), max(one.stop for one in along))
                for along in zip(*touched, strict=True)
            )


def _distribute(forms: Sequence[_Form], raws: Sequence[_Raw], span: Part, parts: Sequence[Wanted]) -> int:
    """Give each target its part of what was read; the bytes of the targets that were filled.

    Args:
        forms: the parameter's, and those of others that are tied to it.
        raws: what was read of ``span`` of each.
    """
    filled = 0
    for place, values in forms[0].values(span, raws[0]):
        for other, raw in zip(forms[1:], raws[1:], strict=True):
            _refuse_other(forms[0], other, values, next(other.values(place, raw))[1], parts[0].target.dtype)
        for one in parts:
            common = tuple(_common(own, there) for own, there in zip(one.part, place, strict=True))
            if not _is_empty(common):
                target = one.target[_within(common, one.part)]
                target.copy_(values[_within(common, place)])
                filled += target.nbytes
    return filled


def _is_empty(part: Part) -> bool:
    return any(one.stop <= one.start for one in part)


def _common(one: slice, other: slice) -> slice:
    return slice(max(one.start, other.start), min(one.stop, other.stop))


def _within(inner: Part, outer: Part) -> Part:
    """The same values' place, counted from where ``outer`` begins."""
    return tuple(slice(one.start - base.start, one.stop - base.start) for one, base in zip(inner, outer, strict=True))


# --- which tensor is which parameter's --------------------------------------------------------------------------------


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


def _of_one_file(file: TensorFile) -> Files:
    return dict.fromkeys(file.names, file)


def _weight_map(index: str) -> Mapping[str, str]:
    """The file of each tensor, by an index's word."""
    told: dict[str, Any] = json.loads(index)
    named: dict[str, str] = told["weight_map"]
    return named


def _refuse_shape(name: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if stored != wanted:
        raise ConfigError(
            f"{name} is {list(stored)} in the model's files, {list(wanted)} by its config.json: give a whole model"
        )


def _refuse_other(form: _Form, tied: _Form, values: torch.Tensor, others: torch.Tensor, dtype: torch.dtype) -> None:
    """Refuse a tied parameter that has values of its own."""
    if not torch.equal(values.to(dtype), others.to(dtype)):
        raise ConfigError(
            f"config.json ties {tied.name} to {form.name}, and the files give it values of its own: "
            "set tie_word_embeddings to false there"
        )
