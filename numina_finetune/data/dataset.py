"""Load -> prepare, once, into a token index on disk.

The index is found again by its cache key: the content of the sources, the options, the tokenizer and the version of
this room's output. What it holds is named by its data key, the hash of the tokens themselves; that is what a resumed
run compares.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import numpy as np
from tqdm import tqdm

from numina_finetune import storage
from numina_finetune.config import SourceConfig
from numina_finetune.data.contamination import Contamination, build_benchmark, question_of
from numina_finetune.data.formats import column_faults, format_example, recognise
from numina_finetune.data.prepare import Drops, IndexOptions, Preparation, Prepared, Rows
from numina_finetune.data.shared_cache import fetch_or_build
from numina_finetune.data.sources import benchmark_source, content_key, load_rows, resolve_source
from numina_finetune.data.token_index import ARRAYS, GrowingArray, TokenIndex, digest, open_index, sync
from numina_finetune.data.tool_columns import ToolColumns
from numina_finetune.data.workers import ordered_map
from numina_finetune.errors import DataError
from numina_finetune.files import user_cache

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

DATA_VERSION = 2
"""Raised whenever the same rows would give other tokens; every cached index is then built anew."""

CHUNK_ROWS = 512
"""Rows prepared at once."""

ROWS_WORTH_WORKERS = 50_000
"""Rows of a source from which starting worker processes pays; each takes seconds to import its libraries."""

ROWS_RECOGNISED = 20
"""First rows that ``auto`` looks at."""

_OVERLONG_NAMED = 10
"""Rows that the error of ``split-error`` names."""


def build_index(
    sources: Sequence[SourceConfig],
    tokenizer: PreTrainedTokenizerBase,
    options: IndexOptions,
    cache_dir: str | Path | None = None,
    *,
    workers: int | None = None,
    streaming: bool = False,
) -> TokenIndex:
    """The sources' samples as tokens, from the cache where they are there.

    One process builds, others that want the same index wait for it. A build that was killed leaves nothing that a
    later one would read.

    Args:
        cache_dir: a folder, or ``gs://bucket/prefix``, which hosts share and copy to their own default folder; None =
            that default, ``numina_finetune`` under ``XDG_CACHE_HOME`` or ``~/.cache``.
        workers: processes that prepare rows; None = as many as there are cores, for sources that are worth it.
        streaming: read hub datasets and files as streams, without a copy of them on disk.

    Raises:
        DataError: a source does not exist, or gave no sample (with the reasons).
        OSError, or the network library's own: the hub could not be reached.
    """
    sources = [resolve_source(source) for source in sources]
    key = _cache_key(sources, tokenizer, options, streaming)

    def build(folder: Path) -> None:
        _write_index(folder, sources, tokenizer, options, workers, streaming)

    if str(cache_dir).startswith("gs://"):
        return open_index(fetch_or_build(str(cache_dir), key, user_cache(), build))
    local = Path(cache_dir).expanduser() if cache_dir else user_cache()
    return open_index(_built_once(local, key, build))


def load_contamination(names: Sequence[str]) -> Contamination | None:
    """The questions of benchmarks such as ``gsm8k:test``; None for no name.

    Raises:
        DataError: a benchmark does not exist, or its rows are no questions.
    """
    if not names:
        return None
    benchmarks = []
    for name in names:
        source = benchmark_source(name)
        rows = load_rows(source)
        source = with_format(source, rows)
        questions = (question_of(format_example(row, format=source.format)["messages"]) for row in rows)
        benchmarks.append(build_benchmark(name, questions))
    return Contamination(benchmarks)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes with anything that changes a rendering: vocabulary, merges, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    else:
        # the last call's truncation and padding are part of the backend's state; its every call sets them anew
        backend.no_truncation()
        backend.no_padding()
        vocabulary = backend.to_str()
    rest = {"special": tokenizer.special_tokens_map, "template": tokenizer.chat_template}
    return digest((vocabulary + json.dumps(rest, sort_keys=True, default=str)).encode())


@dataclass
class _SourceReport:
    """What became of one source's rows."""

    source: SourceConfig
    rows: int = 0
    truncated: int = 0
    supervised: int = 0
    drops: Drops = field(default_factory=Drops)
    overlaps: Counter[tuple[str, str]] = field(default_factory=Counter)
    lengths: list[np.ndarray[Any, np.dtype[np.int64]]] = field(default_factory=list)
    overlong: list[tuple[int, int]] = field(default_factory=list)

    def add(self, prepared: Prepared) -> None:
        self.rows += prepared.rows
        self.truncated += prepared.truncated
        self.supervised += prepared.supervised
        self.drops.merge(prepared.drops)
        self.overlaps += prepared.overlaps
        self.lengths.append(prepared.lengths)
        self.overlong += prepared.overlong

    def summary(self) -> dict[str, Any]:
        lengths = np.concatenate([np.empty(0, dtype=np.int64), *self.lengths])
        quantiles = np.quantile(lengths, [0.5, 0.9, 0.99, 1], method="nearest").tolist() if len(lengths) else []
        return {
            "name": self.source.name,
            "split": self.source.split,
            "format": self.source.format,
            "rows": self.rows,
            "kept": len(lengths),
            "truncated": self.truncated,
            "dropped": self.drops.summary(),
            "overlaps": {f"{benchmark} ({kind})": count for (benchmark, kind), count in sorted(self.overlaps.items())},
            "tokens": int(lengths.sum()),
            "supervised_tokens": self.supervised,
            "length_quantiles": dict(zip(("p50", "p90", "p99", "max"), quantiles, strict=False)),
        }


# --- building ---------------------------------------------------------------------------------------------------------


def _built_once(cache_dir: Path, key: str, build: Callable[[Path], None]) -> Path:
    """The folder of ``key``, built here unless it is there or another process is building it."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    folder = cache_dir / key
    if folder.exists():
        return folder
    lock = filelock.FileLock(cache_dir / f".{key}.lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        log.info("another process is preparing this data: waiting for it")
        lock.acquire()
    try:
        if not folder.exists():
            for left in cache_dir.glob(f".{key}-*"):  # by a build that was killed: nobody else holds the lock
                shutil.rmtree(left, ignore_errors=True)
            building = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=cache_dir))
            try:
                build(building / "index")
                (building / "index").rename(folder)
                storage.sync_folder(cache_dir)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    finally:
        lock.release()
    return folder


def _write_index(
    folder: Path,
    sources: Sequence[SourceConfig],
    tokenizer: PreTrainedTokenizerBase,
    options: IndexOptions,
    workers: int | None,
    streaming: bool,
) -> None:
    """Writes the arrays and the report into a new folder."""
    folder.mkdir()
    contamination = load_contamination(options.against)
    arrays = {name: GrowingArray(folder / f"{name}.npy", dtype) for name, dtype in ARRAYS.items()}
    arrays["offsets"].append([0])
    end = 0
    summaries = []
    for position, source in enumerate(sources):
        with tempfile.TemporaryDirectory(prefix=".rows-", dir=folder.parent) as rows_folder:
            rows = load_rows(source, Path(rows_folder), streaming=streaming)
            source = with_format(source, rows)
            report = _SourceReport(source)
            for prepared in _prepared(rows, Preparation(source, tokenizer, options, contamination), workers):
                report.add(prepared)
                arrays["input_ids"].append(prepared.input_ids)
                arrays["loss_mask"].append(prepared.loss_mask)
                arrays["offsets"].append(end + np.cumsum(prepared.lengths))
                arrays["source_of"].append(np.full(len(prepared.lengths), position))
                end += len(prepared.input_ids)
        _refuse_overlong(report, options)
        summaries.append(report.summary())
    hashes = [array.close() for array in arrays.values()]
    _refuse_empty(summaries)
    totals = {name: sum(summary[name] for summary in summaries) for name in ("kept", "tokens", "supervised_tokens")}
    data_key = digest("".join(hashes).encode())
    with (folder / "report.json").open("w", encoding="utf-8") as file:
        json.dump({"data_key": data_key, **totals, "sources": summaries}, file, indent=1, ensure_ascii=False)
        sync(file)


def _prepared(rows: Dataset | IterableDataset, preparation: Preparation, workers: int | None) -> Iterator[Prepared]:
    """The rows' samples, a chunk at a time, with a progress bar where there is a terminal."""
    total = rows.num_rows if hasattr(rows, "num_rows") else None
    if workers is None:
        worth = total is None or total >= ROWS_WORTH_WORKERS
        workers = len(os.sched_getaffinity(0)) if worth else 1
    with tqdm(total=total, desc=preparation.source.name, unit="rows", disable=None, dynamic_ncols=True) as bar:
        for prepared in ordered_map(preparation, _chunks(rows), workers):
            bar.update(prepared.rows)
            yield prepared


def _chunks(rows: Dataset | IterableDataset) -> Iterator[Rows]:
    first = 0
    for columns in rows.iter(CHUNK_ROWS):
        names = list(columns)
        chunk = [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        yield Rows(first, chunk)
        first += len(chunk)


def with_format(source: SourceConfig, rows: Dataset | IterableDataset) -> SourceConfig:
    """The source with ``auto`` replaced by what its first rows are; its columns fit.

    Raises:
        DataError: the columns do not fit, or there is no row.
    """
    first = list(itertools.islice(rows, ROWS_RECOGNISED))
    if not first:
        raise DataError(f"dataset {source.name}, split {source.split}, has no rows")
    if faults := column_faults(list(first[0]), source):
        raise DataError(faults)
    if source.format != "auto":
        return source
    fields = (source.question_field, source.answer_field, source.messages_field, ToolColumns.of(source))
    formats = [recognise(row, *fields) for row in first]
    # a tool-integrated solution may do without code, but no other one has code and its output
    return replace(source, format="numina_tir" if "numina_tir" in formats else formats[0])


def _refuse_overlong(report: _SourceReport, options: IndexOptions) -> None:
    if not report.overlong:
        return
    named = ", ".join(f"row {row} ({tokens} tokens)" for row, tokens in report.overlong[:_OVERLONG_NAMED])
    more = " …" if len(report.overlong) > _OVERLONG_NAMED else ""
    raise DataError(
        f"--overlong split-error: {len(report.overlong)} rows of dataset {report.source.name} have more tokens than "
        f"--max-seq-length {options.max_seq_length} ({named}{more}): raise it, or choose --overlong drop or truncate"
    )


def _refuse_empty(summaries: list[dict[str, Any]]) -> None:
    """A source that gives nothing is a mistake of the command, whatever the others give."""
    faults = []
    for summary in summaries:
        if not summary["kept"]:
            reasons = [
                f"{entry['count']}x {reason} (row {entry['examples'][0]['row']}: {entry['examples'][0]['problem']})"
                for reason, entry in summary["dropped"].items()
            ]
            faults.append(
                f"dataset {summary['name']}, split {summary['split']}, format {summary['format']}: none of its "
                f"{summary['rows']} rows can be trained on: {'; '.join(reasons)}"
            )
    if faults:
        raise DataError(faults)


def _cache_key(
    sources: Sequence[SourceConfig], tokenizer: PreTrainedTokenizerBase, options: IndexOptions, streaming: bool
) -> str:
    against = [benchmark_source(name) for name in options.against]
    inputs = {
        "version": DATA_VERSION,
        "sources": [dataclasses.asdict(replace(source, weight=None, max_samples=None)) for source in sources],
        "contents": [content_key(source, streaming) for source in sources],
        "options": dataclasses.asdict(options),
        "against": [content_key(source, streaming=False) for source in against],
        "tokenizer": tokenizer_hash(tokenizer),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]
