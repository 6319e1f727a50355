"""Load -> format -> validate -> render, once, into a token index on disk.

The index is found again by its cache key: the content of the sources, the options, the tokenizer and the version of
this room's output. What it holds is named by its data key, the hash of the tokens themselves; that is what a resumed
run compares.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from numina_finetune.config import SourceConfig
from numina_finetune.data.chat import Rendered, render_many
from numina_finetune.data.conversation import Conversation
from numina_finetune.data.formats import column_faults, format_example, recognise
from numina_finetune.data.sources import load_rows, resolve_source, source_kind
from numina_finetune.data.token_index import ARRAYS, GrowingArray, TokenIndex, digest, open_index, sync
from numina_finetune.data.tool_calls import validate_messages, without_none
from numina_finetune.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

DATA_VERSION = 1
"""Raised whenever the same rows would give other tokens; every cached index is then built anew."""

CHUNK_ROWS = 512
"""Rows tokenised in one call."""


@dataclass(frozen=True)
class IndexOptions:
    """What, besides the rows and the tokenizer, decides the tokens."""

    max_seq_length: int
    overlong: str = "drop"
    """``drop`` or ``truncate`` samples of more than ``max_seq_length`` tokens."""
    system_prompt: str | None = None
    gsm8k_style: str = "plain"
    family: str = "auto"


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


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes with anything that changes a rendering: vocabulary, merges, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state: dict[str, Any] = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        # the last call's truncation and padding are part of the backend's state
        state = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    state |= {"special": tokenizer.special_tokens_map, "template": tokenizer.chat_template}
    return digest(json.dumps(state, sort_keys=True, default=str).encode())


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
    arrays = {name: GrowingArray(folder / f"{name}.npy", dtype) for name, dtype in ARRAYS.items()}
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
    data_key = digest("".join(hashes).encode())
    with (folder / "report.json").open("w", encoding="utf-8") as file:
        json.dump({"data_key": data_key, **totals, "sources": summaries}, file, indent=1, ensure_ascii=False)
        sync(file)


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
    return digest(json.dumps(inputs, sort_keys=True).encode())[:32]


def _content_key(source: SourceConfig) -> str:
    """Hash of a local source's bytes; of a hub or generated dataset, what ``datasets`` knows it by."""
    kind = source_kind(source.name)
    path = Path(source.name).expanduser()
    if kind == "file":
        return _filedigest(path)
    if kind == "folder":
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return digest("".join(f"{file.relative_to(path)}:{_filedigest(file)}\n" for file in files).encode())
    return str(load_rows(source)._fingerprint)


def _filedigest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _move_unless_there(built: Path, folder: Path) -> None:
    try:
        built.rename(folder)
    except OSError:
        if not folder.exists():
            raise
