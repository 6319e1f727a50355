"""Where rows come from: hub names, folders, files, the embedded default; checked before anything is loaded."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numina_finetune.config import ALIASES, FORMATS, RunConfig, SourceConfig
from numina_finetune.data.formats import column_faults
from numina_finetune.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

log = logging.getLogger(__name__)

SYNTHETIC = "synthetic-gsm8k"
DEFAULT_CONFIGS = {"openai/gsm8k": "main"}
"""Hub datasets with several configurations, and the one that is meant."""

FILE_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}

_PEEKED_ROWS = 20
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

# --- names of sources -------------------------------------------------------------------------------------------------


def parse_source_name(name: str) -> tuple[str, str | None]:
    """``name[split]`` as (name, split); the split is None where there is none."""
    match = re.fullmatch(r"(.+?)\[(.+)\]", name)
    return (match[1], match[2]) if match else (name, None)


def resolve_source(source: SourceConfig) -> SourceConfig:
    """The source under its hub's own name (with one notice), with its name's split and its configuration."""
    name, split = source.name, source.split
    if not Path(name).exists():
        name, named = parse_source_name(name)
        split = named or split
    if name in ALIASES and not Path(name).exists():
        name = ALIASES[name]
        _notice_alias(source.name, name)
    return replace(source, name=name, split=split, config=source.config or DEFAULT_CONFIGS.get(name))


def evaluation_source(config: RunConfig) -> SourceConfig | None:
    """The dataset of the evaluation loss, read as the first training dataset is; None if none is named."""
    if not config.eval_dataset_name:
        return None
    name, split = parse_source_name(config.eval_dataset_name)
    like = config.datasets[0] if config.datasets else SourceConfig(name)
    if name != parse_source_name(like.name)[0]:
        like = replace(like, config=None, revision=None)
    return replace(like, name=name, split=split or config.eval_split, weight=None)


def benchmark_source(name: str) -> SourceConfig:
    """``gsm8k:test``, ``name[split]`` or a file as a source; the split is ``test`` where none is named.

    Only what stands behind the last colon without a slash in it is a split: a path may hold one.
    """
    head, colon, tail = name.rpartition(":")
    if colon and "/" not in tail and head not in ("gs", "hf") and not Path(name).exists():
        return resolve_source(SourceConfig(head, split=tail))
    return resolve_source(SourceConfig(name, split="test"))


@cache
def _notice_alias(alias: str, name: str) -> None:
    log.warning("dataset %s is %s on the hub: using that", alias, name)


def source_kind(name: str) -> str:
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
    faults += _faults(resolve_source(evaluation), "--eval-dataset-name") if evaluation else []
    return faults + [fault for name in config.against for fault in _faults(benchmark_source(name), "--against")]


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
    kind = source_kind(source.name)
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


# --- content ----------------------------------------------------------------------------------------------------------


def content_key(source: SourceConfig, streaming: bool) -> str:
    """Hash of a local source's bytes; of a hub or generated dataset, what it is known by.

    Raises:
        OSError, or the network library's own: the hub could not be reached.
    """
    kind = source_kind(source.name)
    path = Path(source.name).expanduser()
    if kind == "file":
        return _filedigest(path)
    if kind == "folder":
        files = sorted(file for file in path.rglob("*") if file.is_file())
        listing = "".join(f"{file.relative_to(path)}:{_filedigest(file)}\n" for file in files)
        return hashlib.sha256(listing.encode()).hexdigest()
    if kind == "hub" and streaming:
        from huggingface_hub import HfApi

        return str(HfApi().dataset_info(source.name, revision=source.revision).sha)
    return str(load_rows(source)._fingerprint)


def _filedigest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- rows -------------------------------------------------------------------------------------------------------------


def load_rows(
    source: SourceConfig,
    cache_dir: Path | None = None,
    *,
    streaming: bool = False,
    flag: str = "--dataset-name",
) -> Dataset | IterableDataset:
    """The source's rows, as published.

    Args:
        source: a hub name, a folder (saved by ``datasets``, or of data files), a file, or ``synthetic-gsm8k``.
            A single file is every split.
        streaming: rows of files and of the hub are read as they are asked for, and kept nowhere.
        cache_dir: where ``datasets`` keeps its Arrow form of local files; its own place if None.
        flag: the option that named the source, as messages have it.

    Raises:
        DataError: the dataset, its configuration or split does not exist, or cannot be read; retrying is no use.
        OSError, or the network library's own: the hub could not be reached.
    """
    source = resolve_source(source)
    kind = source_kind(source.name)
    if kind == "synthetic":
        return _synthetic_rows(source)
    if kind != "hub":
        _columns(source, flag)
    path = Path(source.name).expanduser()
    if kind == "folder" and _is_saved_dataset(path):
        return _saved_rows(source, path)
    arguments: dict[str, Any] = {"split": source.split, "streaming": streaming}
    if kind != "hub" and cache_dir is not None:
        arguments["cache_dir"] = str(cache_dir)
    if kind == "file":
        files = {_split_base(source.split): str(path)}
        arguments |= {"path": FILE_LOADERS[path.suffix], "data_files": files}
    elif kind == "folder":
        arguments |= {"path": str(path), "name": source.config}
    else:
        arguments |= {"path": source.name, "name": source.config, "revision": source.revision}
    return _load_dataset(source, arguments, flag)


def _load_dataset(source: SourceConfig, arguments: dict[str, Any], flag: str) -> Dataset | IterableDataset:
    from datasets import DownloadMode, VerificationMode, disable_progress_bars, load_dataset
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    if not sys.stderr.isatty():
        disable_progress_bars()
    if source_kind(source.name) != "hub":
        # datasets recognises a local file by its time stamp, which a changed file may share; it is read anew each
        # time, and not compared with the number of rows that it had
        arguments |= {
            "download_mode": DownloadMode.FORCE_REDOWNLOAD,
            "verification_mode": VerificationMode.NO_CHECKS,
        }
    try:
        rows: Dataset | IterableDataset = load_dataset(**arguments)
    except DatasetNotFoundError as error:
        raise DataError(
            f"{flag} {source.name} is not on the hub, or needs a login: check the name "
            f"(a file or folder of that name does not exist either). {error}"
        ) from error
    except (ValueError, EmptyDatasetError) as error:
        if "Couldn't find cache" in str(error):  # what the library says where the hub is out of reach
            raise
        raise DataError(f"dataset {source.name} cannot be loaded: {error}") from error
    except DatasetGenerationError as error:
        cause = error.__cause__
        if source_kind(source.name) == "hub" and not isinstance(cause, ValueError | TypeError):
            raise  # a download that broke off, perhaps
        raise DataError(f"dataset {source.name} cannot be read: {cause or error}") from error
    return rows


def _synthetic_rows(source: SourceConfig) -> Dataset:
    from datasets import Dataset, ReadInstruction

    from numina_finetune.data.synthetic import DEFAULT_COUNTS, generate_problems

    _check_split(source, list(DEFAULT_COUNTS))
    try:
        part, *more = ReadInstruction.from_spec(source.split).to_absolute(DEFAULT_COUNTS)
    except ValueError as error:
        raise DataError(f"split {source.split!r} of {source.name}: {error}: write it as in train[:2000]") from error
    if more:
        raise DataError(f"split {source.split!r} of {source.name} is several: name one of them")
    return Dataset.from_list(generate_problems(part.splitname)[part.from_ : part.to])


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
