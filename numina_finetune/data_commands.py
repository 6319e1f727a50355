"""``numina-finetune data …``: prepare, check, preview and report, without a model or a device."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from numina_finetune.checks import config_faults
from numina_finetune.config import RunConfig, SourceConfig
from numina_finetune.data.chat import Rendered, render
from numina_finetune.data.contamination import question_of
from numina_finetune.data.dataset import build_index, load_contamination, with_format
from numina_finetune.data.loader import Loader
from numina_finetune.data.prepare import IndexOptions, Preparation
from numina_finetune.data.preview import packed_samples, preview, printable
from numina_finetune.data.report import summary_lines, write_report
from numina_finetune.data.sources import load_rows, preflight, resolve_source
from numina_finetune.data.token_index import TokenIndex, cap_samples
from numina_finetune.errors import ConfigError, DataError, ExitCode
from numina_finetune.models.tokenizer import load_tokenizer

EXAMPLES_SHOWN = 3
"""Overlaps of each kind that ``check`` prints."""


def run_prepare(config: RunConfig) -> ExitCode:
    """Fill the cache, and say what came of the rows."""
    _refuse_faults(config)
    index, loader = _index(config)
    _summarise(config, index, loader)
    return ExitCode.DONE


def run_report(config: RunConfig, folder: Path) -> ExitCode:
    """Write the data report: counts, lengths, and the first quarantined rows of each reason."""
    _refuse_faults(config)
    index, loader = _index(config)
    rows = loader.rows_per_epoch
    written = write_report(index.report, index.lengths, index.sources, rows, config.max_seq_length, folder)
    _summarise(config, index, loader)
    print("written: " + ", ".join(map(str, written)))
    return ExitCode.DONE


def run_preview(config: RunConfig, count: int, *, color: bool, show_ids: bool) -> ExitCode:
    """Print the first rows of each source as the model will see them, and why others are refused."""
    _refuse_faults(config)
    tokenizer = load_tokenizer(config)
    options = IndexOptions.of(config)
    for source, rows in _sources(config):
        print(f"{source.name}[{source.split}], format {source.format}")
        preparation = Preparation(source, tokenizer, options)
        for number, row in enumerate(itertools.islice(rows, count)):
            rendered = _rendered(preparation, row)
            if isinstance(rendered, DataError):
                print(f"row {number}: refused: {printable(str(rendered))}\n")
            else:
                print(preview(rendered, tokenizer, color=color, show_ids=show_ids, number=number) + "\n")
    return ExitCode.DONE


def run_preview_of_run(config: RunConfig, rows: str, *, color: bool, show_ids: bool) -> ExitCode:
    """Print rows of the batches that a run with these options takes, in its order.

    Args:
        rows: ``1048-1055`` or one number, counted from the run's start.
    """
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", rows)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    wrong = [] if first <= last else [f"--run-rows {rows!r} is no range of rows: write it as 1048-1055"]
    _refuse_faults(config, wrong)
    from numina_finetune.train.preparation import load_data

    tokenizer = load_tokenizer(config)
    loader = load_data(config, tokenizer).train
    for number in range(first, last + 1):
        samples = list(packed_samples(loader.batch(number, 1), 0))
        print(f"row {number}: samples packed in it: {len(samples)}")
        for position, sample in enumerate(samples):
            print(preview(sample, tokenizer, color=color, show_ids=show_ids, number=position) + "\n")
    return ExitCode.DONE


def run_check(config: RunConfig) -> ExitCode:
    """Print which rows ask a benchmark's question; a fault unless ``--decontaminate`` drops them in training."""
    faults = [] if config.against else ["--against is missing: name a benchmark, such as --against gsm8k:test"]
    _refuse_faults(replace(config, model_name=config.model_name or "none needed"), faults)
    contamination = load_contamination(config.against)
    assert contamination is not None
    found = 0
    for source, rows in _sources(config):
        preparation = Preparation(source, None, IndexOptions.of(config))  # type: ignore[arg-type]
        counts, refused, total = Counter[tuple[str, str]](), 0, 0
        for number, row in enumerate(tqdm(rows, desc=source.name, unit="rows", disable=None)):
            total += 1
            try:
                overlap = contamination.find(question_of(preparation.conversation(row).messages))
            except DataError:
                refused += 1
                continue
            if overlap is None:
                continue
            counts[overlap.benchmark, overlap.kind] += 1
            if counts[overlap.benchmark, overlap.kind] <= EXAMPLES_SHOWN:
                where = f"row {number} ~ {overlap.benchmark} row {overlap.index} ({overlap.kind})"
                print(f"{where}: {printable(overlap.text)}")
        print(f"{source.name}[{source.split}]: {total} rows, {refused} of them no conversation")
        for benchmark in config.against:
            exact, ngram = counts[benchmark, "exact"], counts[benchmark, "ngram"]
            print(f"  {benchmark}: {exact} rows ask the same question, {ngram} share an n-gram with one")
        found += counts.total()
    if found and config.decontaminate:
        print(f"--decontaminate drops these {found} rows")
    elif found:
        print(f"{found} rows overlap: --against {' --against '.join(config.against)} --decontaminate drops them")
    return ExitCode.FAULTS_FOUND if found and not config.decontaminate else ExitCode.DONE


def _refuse_faults(config: RunConfig, faults: list[str] | None = None) -> None:
    """Raises ConfigError with all that is wrong; the commands need no output folder, and no model but its tokenizer."""
    complete = replace(config, output_dir=".", model_name=config.model_name or config.tokenizer_name or "")
    faults = [*(faults or []), *config_faults(complete), *preflight(config.datasets, config)]
    if faults:
        raise ConfigError(dict.fromkeys(faults))


def _index(config: RunConfig) -> tuple[TokenIndex, Loader]:
    tokenizer = load_tokenizer(config)
    index = build_index(
        config.datasets,
        tokenizer,
        IndexOptions.of(config),
        config.cache_dir,
        workers=config.preprocessing_num_workers,
        streaming=config.streaming,
    )
    capped = cap_samples(index, [source.max_samples for source in config.datasets], config.seed)
    pad_id = int(tokenizer.pad_token_id)
    return capped, Loader(
        capped, seq_len=config.max_seq_length, packing=config.packing, seed=config.seed, pad_id=pad_id
    )


def _summarise(config: RunConfig, index: TokenIndex, loader: Loader) -> None:
    tokens = int(index.lengths.sum())
    print("\n".join(summary_lines(index.report, loader.rows_per_epoch, config.max_seq_length, tokens=tokens)))


def _sources(config: RunConfig) -> Iterator[tuple[SourceConfig, Any]]:
    """Each source, its format resolved, and its rows."""
    for source in config.datasets:
        source = resolve_source(source)
        rows = load_rows(source, streaming=config.streaming)
        yield with_format(source, rows), rows


def _rendered(preparation: Preparation, row: dict[str, Any]) -> Rendered | DataError:
    try:
        conversation = preparation.conversation(row)
        return render(conversation, preparation.tokenizer, options=preparation.options.chat)
    except DataError as error:
        return error
