"""Load -> format -> validate -> render, once, into a token index on disk.

The index is found again by its cache key: the content of the sources, the options, the tokenizer and the version of
this room's output. What it holds is named by its data key, the hash of the tokens themselves; that is what a resumed
run compares.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from numina_finetune.config import ALIASES, FORMATS, RunConfig, SourceConfig
from numina_finetune.data.chat import Rendered, render_many
from numina_finetune.data.conversation import Conversation
from numina_finetune.data.formats import column_faults, format_example, recognise
from numina_finetune.data.tool_calls import validate_messages, without_none
from numina_finetune.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

DATA_VERSION = 1
"""Raised whenever the same rows would give other tokens; every cached index is then built anew."""

SYNTHETIC = "synthetic-gsm8k"
DEFAULT_CONFIGS = {"openai/gsm8k": "main"}
"""Hub datasets with several configurations, and the one that is meant."""

FILE_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
CHUNK_ROWS = 512
"""Rows tokenised in one call."""

_PEEKED_ROWS = 20
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

# --- names of sources -------------------------------------------------------------------------------------------------


def parse_source_name(name: str) -> tuple[str, str | None]:
    """``name[split]`` as (name, split); the split is None where there is none."""
    match = re.fullmatch(r"(.+?)\[(.+)\]", name)
    return (match[1], match[2]) if match else (name, None)


def resolve_source(source: SourceConfig) -> SourceConfig:
    """The source under its hub's own name (with one notice) and with its default configuration."""
    name = source.name
    if name in ALIASES and not Path(name).exists():
        name = ALIASES[name]
        _notice_alias(source.name, name)
    return replace(source, name=name, config=source.config or DEFAULT_CONFIGS.get(name))


def evaluation_source(config: RunConfig) -> SourceConfig | None:
    """The dataset of the evaluation loss, read as the first training dataset is; None if none is named."""
    if not config.eval_dataset_name:
        return None
    name, split = parse_source_name(config.eval_dataset_name)
    like = config.datasets[0] if config.datasets else SourceConfig(name)
    if name != like.name:
        like = replace(like, config=None, revision=None)
    return replace(like, name=name, split=split or config.eval_split, weight=None)


@cache
def _notice_alias(alias: str, name: str) -> None:
    log.warning("dataset %s is %s on the hub: using that", alias, name)


def _kind(name: str) -> str:
    """``synthetic``, ``file``, ``folder``, ``hub`` or, for a path to nothing, ``missing``."""
    if name == SYNTHETIC:
        return "synthetic"
    path = Path(name).expanduser()
    if path.is_dir():
        return "folder"
    if path.exists():
        return "file"
    if path.suffix in FILE_LOADERS or name.startswith((".", "/", "~")) or name.count("/") > 1:
        return "missing"
    return "hub"


# --- preflight --------------------------------------------------------------------------------------------------------


def preflight(sources: Sequence[SourceConfig], config: RunConfig) -> list[str]:
    """What can be seen to be wrong with the data before anything is loaded; empty if nothing.

    Local files are opened for their first rows only; hub names are only checked for being names.

    Args:
        sources: the training datasets.
        config: names the evaluation dataset, which is checked too.
    """
    evaluation = evaluation_source(config)
    faults = [fault for source in sources for fault in _faults(resolve_source(source), "--dataset-name")]
    return faults + (_faults(resolve_source(evaluation), "--eval-dataset-name") if evaluation else [])


def _faults(source: SourceConfig, flag: str) -> list[str]:
    if source.format not in FORMATS:
        return [f"--format {source.format!r} (dataset {source.name}) is unknown: use one of {', '.join(FORMATS)}"]
    try:
        columns = _columns(source, flag)
    except DataError as error:
        return error.problems
    return [] if columns is None else column_faults(columns, source)


def _columns(source: SourceConfig, flag: str) -> list[str] | None:
    """The columns of a local source, read from its beginning; None for a hub name.

    Raises:
        DataError: there is nothing to read, or it cannot be read.
    """
    kind = _kind(source.name)
    path = Path(source.name).expanduser()
    if kind == "missing":
        raise DataError(f"{flag} {source.name} does not exist: check the path (it would be {path.absolute()})")
    if kind == "synthetic":
        _check_split(source, ["train", "test"])
        return ["question", "answer"]
    if kind == "file":
        return _file_columns(source, path)
    if kind == "folder":
        return _folder_columns(source, path)
    if not _HUB_NAME.fullmatch(source.name):
        raise DataError(f"{flag} {source.name} is no file, folder or hub name: a hub name reads like openai/gsm8k")
    return None


def _file_columns(source: SourceConfig, path: Path) -> list[str]:
    loader = FILE_LOADERS.get(path.suffix)
    if loader is None:
        raise DataError(f"dataset {source.name}: files of type {path.suffix!r} are unknown, use {_known_suffixes()}")
    try:
        columns = _parquet_columns(path) if loader == "parquet" else _json_columns(path)
    except (ValueError, OSError) as error:
        raise DataError(f"dataset {source.name} cannot be read: {error}") from error
    if not columns:
        raise DataError(f"dataset {source.name} is empty: it needs at least one row")
    return columns


def _parquet_columns(path: Path) -> list[str]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        return list(file.schema_arrow.names) if file.metadata.num_rows else []


def _json_columns(path: Path) -> list[str]:
    """The keys of the first rows of a JSON Lines file, or of a JSON array, in order of appearance."""
    with path.open(encoding="utf-8") as file:
        rows: list[Any] = []
        for line in file:
            if line.lstrip().startswith("[") and not rows:
                file.seek(0)
                rows = json.load(file)[:_PEEKED_ROWS]
                break
            if line.strip():
                rows.append(json.loads(line))
            if len(rows) == _PEEKED_ROWS:
                break
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("its rows are not JSON objects")
    return list(dict.fromkeys(key for row in rows for key in row))


def _folder_columns(source: SourceConfig, path: Path) -> list[str]:
    if _is_saved_dataset(path):
        return list(_saved_rows(source, path).column_names)  # maps the files, reads none
    files = _data_files(source, path)
    base = _split_base(source.split)
    _check_split(source, list(files))
    first = Path(files[base][0])
    return _file_columns(replace(source, name=str(first)), first)


def _data_files(source: SourceConfig, path: Path) -> dict[str, list[str]]:
    """Split -> files, as the ``datasets`` library sorts a folder of data files."""
    from datasets import load_dataset_builder

    try:
        builder = load_dataset_builder(str(path), source.config)
    except (ValueError, OSError) as error:
        raise DataError(f"dataset {source.name} cannot be read: {error}") from error
    return {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}


def _check_split(source: SourceConfig, splits: Sequence[str]) -> None:
    if _split_base(source.split) not in splits:
        raise DataError(
            f"split {source.split!r} is not in dataset {source.name}, which has {', '.join(splits) or 'none'}: "
            f"name one of them, as in {source.name}[{next(iter(splits), 'train')}]"
        )


def _split_base(split: str) -> str:
    """``train`` of ``train[:10%]``."""
    return split.partition("[")[0]


def _known_suffixes() -> str:
    return ", ".join(FILE_LOADERS)


# --- rows -------------------------------------------------------------------------------------------------------------


def load_rows(source: SourceConfig, cache_dir: Path | None = None) -> Dataset:
    """The source's rows, as published.

    Args:
        source: a hub name, a folder (saved by ``datasets``, or of data files), a file, or ``synthetic-gsm8k``.
            A single file is every split.
        cache_dir: where ``datasets`` keeps its Arrow form of local files; its own place if None.

    Raises:
        DataError: the dataset, its configuration or split does not exist, or cannot be read; retrying is no use.
        OSError, or the network library's own: the hub could not be reached.
    """
    source = resolve_source(source)
    kind = _kind(source.name)
    if kind == "synthetic":
        return _synthetic_rows(source)
    if kind != "hub":
        _columns(source, "--dataset-name")
    path = Path(source.name).expanduser()
    if kind == "folder" and _is_saved_dataset(path):
        return _saved_rows(source, path)
    arguments: dict[str, Any] = {"split": source.split}
    if kind != "hub" and cache_dir is not None:
        arguments["cache_dir"] = str(cache_dir)
    if kind == "file":
        files = {_split_base(source.split): str(path)}
        arguments |= {"path": FILE_LOADERS[path.suffix], "data_files": files}
    elif kind == "folder":
        arguments |= {"path": str(path), "name": source.config}
    else:
        arguments |= {"path": source.name, "name": source.config, "revision": source.revision}
    return _load_dataset(source, arguments)


def _load_dataset(source: SourceConfig, arguments: dict[str, Any]) -> Dataset:
    from datasets import DownloadMode, VerificationMode, load_dataset
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    if _kind(source.name) != "hub":
        # datasets recognises a local file by its time stamp, which a changed file may share; it is read anew each
        # time, and not compared with the number of rows that it had
        arguments |= {
            "download_mode": DownloadMode.FORCE_REDOWNLOAD,
            "verification_mode": VerificationMode.NO_CHECKS,
        }
    try:
        rows: Dataset = load_dataset(**arguments)
    except DatasetNotFoundError as error:
        raise DataError(
            f"--dataset-name {source.name} is not on the hub, or needs a login: check the name "
            f"(a file or folder of that name does not exist either). {error}"
        ) from error
    except (ValueError, EmptyDatasetError) as error:
        if "Couldn't find cache" in str(error):  # what the library says where the hub is out of reach
            raise
        raise DataError(f"dataset {source.name} cannot be loaded: {error}") from error
    except DatasetGenerationError as error:
        cause = error.__cause__
        if _kind(source.name) == "hub" and not isinstance(cause, ValueError | TypeError):
            raise  # a download that broke off, perhaps
        raise DataError(f"dataset {source.name} cannot be read: {cause or error}") from error
    return rows


def _synthetic_rows(source: SourceConfig) -> Dataset:
    from datasets import Dataset

    from numina_finetune.data.synthetic import generate_problems

    _check_split(source, ["train", "test"])
    return Dataset.from_list(generate_problems(source.split))


def _saved_rows(source: SourceConfig, path: Path) -> Dataset:
    from datasets import Dataset, load_from_disk

    saved = load_from_disk(str(path))
    if isinstance(saved, Dataset):
        return saved
    if source.split not in saved:
        _check_split(source, list(saved))
        raise DataError(f"split {source.split!r}: dataset {source.name} was saved by split, name a whole one")
    return saved[source.split]


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


# --- the token index --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IndexOptions:
    """What, besides the rows and the tokenizer, decides the tokens."""

    max_seq_length: int
    overlong: str = "drop"
    """``drop`` or ``truncate`` samples of more than ``max_seq_length`` tokens."""
    system_prompt: str | None = None
    gsm8k_style: str = "plain"
    family: str = "auto"


@dataclass(frozen=True)
class TokenIndex:
    """Tokenised samples, memory-mapped.

    The arrays hold every stored sample; an index may have only some of them as members, such as a training part.
    Sample i of the index is stored sample ``members[i]``.
    """

    input_ids: NDArray[np.int32]
    """[stored tokens]."""
    loss_mask: NDArray[np.bool_]
    """[stored tokens], True where the token is a target."""
    offsets: NDArray[np.int64]
    """[stored samples + 1], where each begins."""
    source_of: NDArray[np.int16]
    """[stored samples], position of its source."""
    members: NDArray[np.int64]
    """[samples]."""
    data_key: str
    """Hash of what the index holds."""
    report: dict[str, Any]
    """Rows read, kept and dropped, by source; of all stored samples."""

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[samples], tokens of each."""
        return np.asarray(self.offsets[self.members + 1] - self.offsets[self.members])

    @cached_property
    def sources(self) -> NDArray[np.int16]:
        """[samples], position of its source."""
        return np.asarray(self.source_of[self.members])

    def sample(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """``input_ids`` and ``loss_mask`` of one sample, [its tokens] each."""
        stored = self.members[number]
        part = slice(self.offsets[stored], self.offsets[stored + 1])
        return self.input_ids[part], self.loss_mask[part]


def build_index(
    sources: Sequence[SourceConfig], tokenizer: PreTrainedTokenizerBase, options: IndexOptions, cache_dir: Path
) -> TokenIndex:
    """The sources' samples as tokens, from the cache where they are there.

    Processes may build the same index at the same time; the first to finish provides it.

    Raises:
        DataError: a source does not exist, or gave no sample (with the reasons).
        OSError, or the network library's own: the hub could not be reached.
    """
    sources = [resolve_source(source) for source in sources]
    cache_dir = Path(cache_dir).expanduser()
    cache_dir.mkdir(parents=True, exist_ok=True)
    contents = [_content_key(source) for source in sources]
    folder = cache_dir / _cache_key(sources, contents, tokenizer, options)
    if not folder.exists():
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache_dir))
        try:
            _write_index(building / "index", sources, tokenizer, options, building / "rows")
            _move_unless_there(building / "index", folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return open_index(folder)


def open_index(folder: Path) -> TokenIndex:
    """The index in ``folder``.

    Raises:
        DataError: the folder does not hold a whole index.
    """
    try:
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _DTYPES}
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        whole = arrays["offsets"][-1] == len(arrays["input_ids"]) == len(arrays["loss_mask"])
    except (OSError, ValueError) as error:
        raise DataError(f"the cached data in {folder} is damaged ({error}): delete that folder") from error
    if not whole:
        raise DataError(f"the cached data in {folder} is damaged (arrays do not match): delete that folder")
    members = np.arange(len(arrays["source_of"]), dtype=np.int64)
    return TokenIndex(**arrays, members=members, data_key=report["data_key"], report=report)


def split_validation(index: TokenIndex, size: float, seed: int) -> tuple[TokenIndex, TokenIndex]:
    """The index in two: (training, validation).

    A hash of its tokens decides for each sample, so the choice does not depend on their order, and equal samples
    are on the same side (which may make the validation part a little larger than asked).

    Args:
        size: share of the samples if below 1, else their number.

    Raises:
        DataError: one of the parts would be empty.
    """
    wanted = round(size * len(index)) if size < 1 else int(size)
    if not 0 < wanted < len(index):
        raise DataError(f"--validation-size {size:g} of {len(index)} samples leaves one part empty")
    salt = seed.to_bytes(8, "little", signed=True)
    hashes = np.array([_sample_hash(index.sample(number)[0], salt) for number in range(len(index))], dtype=np.uint64)
    held_out = hashes <= np.sort(hashes)[wanted - 1]
    if held_out.all():
        raise DataError(f"--validation-size {size:g}: the samples are too much alike to be split")
    return _part(index, ~held_out), _part(index, held_out)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes with anything that changes a rendering: vocabulary, merges, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state: dict[str, Any] = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        # the last call's truncation and padding are part of the backend's state
        state = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    state |= {"special": tokenizer.special_tokens_map, "template": tokenizer.chat_template}
    return _digest(json.dumps(state, sort_keys=True, default=str).encode())


_DTYPES: dict[str, str] = {"input_ids": "<i4", "loss_mask": "|b1", "offsets": "<i8", "source_of": "<i2"}


class _GrowingArray:
    """A one-dimensional ``.npy`` file that is appended to; its header is rewritten at the end."""

    def __init__(self, path: Path, dtype: str) -> None:
        self._dtype = np.dtype(dtype)
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self._count = 0
        self._write_header()

    def append(self, values: Any) -> None:
        data = np.asarray(values, dtype=self._dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self._count += len(data) // self._dtype.itemsize

    def close(self) -> str:
        """Completes the file; returns the hash of its values."""
        self._file.seek(0)
        self._write_header()
        _sync(self._file)
        self._file.close()
        return self._hash.hexdigest()

    def _write_header(self) -> None:
        # NumPy pads the header for growth along the first axis, so that it keeps its length
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self._count,)}
        np.lib.format.write_array_header_1_0(self._file, header)


class _SourceReport:
    """What became of one source's rows."""

    def __init__(self, source: SourceConfig) -> None:
        self.source = source
        self.rows = self.truncated = self.supervised = 0
        self.dropped: dict[str, dict[str, Any]] = {}
        self.lengths: list[int] = []

    def drop(self, problem: str) -> None:
        """Counts the row that was read last, under its reason; the first one is the example."""
        entry = self.dropped.setdefault(_reason(problem), {"count": 0, "example": f"row {self.rows - 1}: {problem}"})
        entry["count"] += 1

    def keep(self, length: int, supervised: int) -> None:
        self.lengths.append(length)
        self.supervised += supervised

    def summary(self) -> dict[str, Any]:
        quantiles = np.quantile(self.lengths, [0.5, 0.9, 0.99, 1], method="nearest").tolist() if self.lengths else []
        return {
            "name": self.source.name,
            "split": self.source.split,
            "format": self.source.format,
            "rows": self.rows,
            "kept": len(self.lengths),
            "truncated": self.truncated,
            "dropped": self.dropped,
            "tokens": sum(self.lengths),
            "supervised_tokens": self.supervised,
            "length_quantiles": dict(zip(("p50", "p90", "p99", "max"), quantiles, strict=False)),
        }


def _write_index(
    folder: Path,
    sources: Sequence[SourceConfig],
    tokenizer: PreTrainedTokenizerBase,
    options: IndexOptions,
    rows_folder: Path,
) -> None:
    folder.mkdir()
    arrays = {name: _GrowingArray(folder / f"{name}.npy", dtype) for name, dtype in _DTYPES.items()}
    arrays["offsets"].append([0])
    end = 0
    summaries = []
    for position, source in enumerate(sources):
        rows = load_rows(source, rows_folder)
        report = _SourceReport(_with_format(source, rows))
        for sample in _samples(rows, report, tokenizer, options):
            end += len(sample.input_ids)
            arrays["input_ids"].append(sample.input_ids)
            arrays["loss_mask"].append(sample.loss_mask)
            arrays["offsets"].append([end])
            arrays["source_of"].append([position])
        summaries.append(report.summary())
    hashes = [array.close() for array in arrays.values()]
    _refuse_empty(summaries)
    totals = {name: sum(summary[name] for summary in summaries) for name in ("kept", "tokens", "supervised_tokens")}
    data_key = _digest("".join(hashes).encode())
    with (folder / "report.json").open("w", encoding="utf-8") as file:
        json.dump({"data_key": data_key, **totals, "sources": summaries}, file, indent=1, ensure_ascii=False)
        _sync(file)


def _samples(
    rows: Dataset, report: _SourceReport, tokenizer: PreTrainedTokenizerBase, options: IndexOptions
) -> Iterator[Rendered]:
    """The rows that can be trained on, rendered; the others go into the report."""
    for chunk in _chunks(rows):
        conversations = [_conversation_or_error(row, report.source, options) for row in chunk]
        good = [conversation for conversation in conversations if isinstance(conversation, Conversation)]
        rendered = iter(render_many(good, tokenizer, family=options.family))
        for conversation in conversations:
            report.rows += 1
            result = next(rendered) if isinstance(conversation, Conversation) else conversation
            sample = _fitted(result, report, options)
            if sample is not None:
                report.keep(len(sample.input_ids), sum(sample.loss_mask[1:]))
                yield sample


def _fitted(result: Rendered | DataError, report: _SourceReport, options: IndexOptions) -> Rendered | None:
    """The sample within the length limit, or None if it was dropped."""
    if isinstance(result, DataError):
        report.drop(result.problems[0])
        return None
    limit = options.max_seq_length
    if len(result.input_ids) > limit:
        if options.overlong == "drop":
            report.drop(f"{len(result.input_ids)} tokens are more than --max-seq-length {limit}")
            return None
        report.truncated += 1
        result = Rendered(result.input_ids[:limit], result.loss_mask[:limit])
    if not any(result.loss_mask[1:]):  # the first token is nobody's target
        report.drop(f"no supervised token within --max-seq-length {limit}")
        return None
    return result


def _chunks(rows: Dataset) -> Iterator[list[dict[str, Any]]]:
    for columns in rows.iter(CHUNK_ROWS):
        names = list(columns)
        yield [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _conversation_or_error(
    row: dict[str, Any], source: SourceConfig, options: IndexOptions
) -> Conversation | DataError:
    try:
        example = format_example(
            row,
            format=source.format,
            question_field=source.question_field,
            answer_field=source.answer_field,
            messages_field=source.messages_field,
            system_prompt=options.system_prompt,
            gsm8k_style=options.gsm8k_style,
        )
        return Conversation(validate_messages(example["messages"], example["tools"]), without_none(example["tools"]))
    except DataError as error:
        return error


def _with_format(source: SourceConfig, rows: Dataset) -> SourceConfig:
    """The source with ``auto`` replaced by what its first row is; its columns fit.

    Raises:
        DataError: the columns do not fit, or there is no row.
    """
    if not len(rows):
        raise DataError(f"dataset {source.name}, split {source.split}, has no rows")
    if faults := column_faults(rows.column_names, source):
        raise DataError(faults)
    if source.format != "auto":
        return source
    fields = (source.question_field, source.answer_field, source.messages_field)
    return replace(source, format=recognise(rows[0], *fields))


def _refuse_empty(summaries: list[dict[str, Any]]) -> None:
    """A source that gives nothing is a mistake of the command, whatever the others give."""
    faults = []
    for summary in summaries:
        if not summary["kept"]:
            dropped = summary["dropped"].items()
            reasons = [f"{entry['count']}x {reason} ({entry['example']})" for reason, entry in dropped]
            faults.append(
                f"dataset {summary['name']}, split {summary['split']}, format {summary['format']}: none of its "
                f"{summary['rows']} rows can be trained on: {'; '.join(reasons)}"
            )
    if faults:
        raise DataError(faults)


def _reason(problem: str) -> str:
    """A problem without what is particular to its row, so that equal problems are counted together."""
    problem = re.sub(r"'[^']*'|\"[^\"]*\"", "…", problem)
    return re.sub(r"(?<![\w.-])\d+(?![\w.])", "N", problem)


def _cache_key(
    sources: Sequence[SourceConfig], contents: list[str], tokenizer: PreTrainedTokenizerBase, options: IndexOptions
) -> str:
    inputs = {
        "version": DATA_VERSION,
        "sources": [dataclasses.asdict(replace(source, weight=None)) for source in sources],
        "contents": contents,
        "options": dataclasses.asdict(options),
        "tokenizer": tokenizer_hash(tokenizer),
    }
    return _digest(json.dumps(inputs, sort_keys=True).encode())[:32]


def _content_key(source: SourceConfig) -> str:
    """Hash of a local source's bytes; of a hub or generated dataset, what ``datasets`` knows it by."""
    kind = _kind(source.name)
    path = Path(source.name).expanduser()
    if kind == "file":
        return _file_digest(path)
    if kind == "folder":
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return _digest("".join(f"{file.relative_to(path)}:{_file_digest(file)}\n" for file in files).encode())
    return str(load_rows(source)._fingerprint)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sample_hash(input_ids: NDArray[np.int32], salt: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(input_ids.tobytes(), digest_size=8, salt=salt).digest(), "little")


def _part(index: TokenIndex, chosen: NDArray[np.bool_]) -> TokenIndex:
    members = index.members[chosen]
    return replace(index, members=members, data_key=_digest(index.data_key.encode() + members.tobytes()))


def _move_unless_there(built: Path, folder: Path) -> None:
    try:
        built.rename(folder)
    except OSError:
        if not folder.exists():
            raise


def _sync(file: Any) -> None:
    """Onto the disk: the folder's name must never outlive its content."""
    file.flush()
    os.fsync(file.fileno())
