"""What became of the rows, for a person to read: counts, lengths, and the first rows that were refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numina_finetune import storage
from numina_finetune.data.preview import printable

REASONS_SHOWN = 5
"""Reasons that the terminal shows for each source; the files hold all."""

CONTENT_SHOWN = 1200
"""Characters of a refused row that the report shows."""

_BINS = 36

_LOG_COUNTS_FROM = 20
"""Counts are drawn on a logarithmic scale where the largest source has so many times the smallest one's samples."""


def write_report(
    report: Mapping[str, Any],
    lengths: NDArray[np.int64],
    source_of: NDArray[np.int16],
    rows_per_epoch: int,
    seq_len: int,
    folder: Path,
) -> list[Path]:
    """Write ``data_report.json``, ``data_report.md`` and ``lengths.png``; returns their paths.

    Args:
        report: a token index's: ``data_key``, ``kept``, ``tokens``, ``supervised_tokens`` and, for each of
            ``sources``, what became of its rows.
        lengths: [samples], tokens of each sample that is trained on.
        source_of: [samples], the place of each one's source in ``report["sources"]``.
        rows_per_epoch: rows of the batch that hold each of these samples once.
        seq_len: tokens of such a row.
    """
    tokens = int(lengths.sum())
    figures = {
        "samples": len(lengths),
        "sample_tokens": tokens,
        "rows_per_epoch": rows_per_epoch,
        "seq_len": seq_len,
        "fill": _ratio(tokens, rows_per_epoch * seq_len),
        "supervised_share": _ratio(report["supervised_tokens"], report["tokens"]),
    }
    paths = [folder / name for name in ("data_report.json", "data_report.md", "lengths.png")]
    storage.write_json(paths[0], {**report, **figures})
    storage.write_text(paths[1], _markdown(report, figures, paths[2].name))
    _plot_lengths([_name(source) for source in report["sources"]], lengths, source_of, seq_len, paths[2])
    return paths


def summary_lines(
    report: Mapping[str, Any], rows_per_epoch: int, seq_len: int, *, tokens: int | None = None
) -> list[str]:
    """The report in few lines, for the terminal.

    Args:
        tokens: of the samples in the ``rows_per_epoch`` rows, where these are not all samples of the report.
    """
    lines = []
    for source in report["sources"]:
        cut = f" ({source['truncated']:,} truncated)" if source["truncated"] else ""
        dropped = sum(drop["count"] for drop in source["dropped"].values())
        lines.append(
            f"{printable(_name(source))}: {source['rows']:,} rows, {source['kept']:,} kept{cut}, {dropped:,} dropped"
        )
        lines += _reason_lines(source["dropped"])
        for benchmark, count in source.get("overlaps", {}).items():
            lines.append(f"  {count:,} rows overlap with {printable(benchmark)}")
        if source["length_quantiles"]:
            quantiles = ", ".join(f"{name} {value:,}" for name, value in source["length_quantiles"].items())
            lines.append(f"  tokens of a sample: {quantiles}")
    lines.append(
        f"{report['tokens']:,} tokens, {_percent(report['supervised_tokens'], report['tokens'])} of them supervised"
    )
    in_rows = report["tokens"] if tokens is None else tokens
    lines.append(f"{_filled(rows_per_epoch, seq_len, in_rows)}; data key {report['data_key']}")
    return lines


def _reason_lines(dropped: Mapping[str, Any]) -> list[str]:
    """The commonest reasons, and how many rows the others have."""
    ordered = _by_count(dropped)
    lines = [f"  {drop['count']:,} dropped: {_one_line(reason)}" for reason, drop in ordered[:REASONS_SHOWN]]
    if others := ordered[REASONS_SHOWN:]:
        lines.append(f"  {sum(drop['count'] for _, drop in others):,} dropped for {len(others)} other reasons")
    return lines


# --- markdown ---------------------------------------------------------------------------------------------------------


def _markdown(report: Mapping[str, Any], figures: Mapping[str, Any], picture: str) -> str:
    sources = report["sources"]
    part = "" if figures["samples"] == report["kept"] else f" They hold {figures['samples']:,} of the samples."
    filled = _filled(figures["rows_per_epoch"], figures["seq_len"], figures["sample_tokens"])
    sections = [
        "# Data report",
        f"Data key `{report['data_key']}`. {filled[0].upper()}{filled[1:]}.{part}",
        "## Rows",
        _rows_table(sources),
        "## Tokens",
        _tokens_table(sources),
        f"![Histogram of the samples' lengths]({picture})",
    ]
    overlaps = [
        (_name(source), benchmark, f"{count:,}", _percent(count, source["rows"]))
        for source in sources
        for benchmark, count in source.get("overlaps", {}).items()
    ]
    if overlaps:
        sections += ["## Overlaps with benchmarks", _table(("source", "benchmark", "rows", "share"), overlaps, 2)]
    drops = [
        (_name(source), reason, f"{drop['count']:,}", _percent(drop["count"], source["rows"]))
        for source in sources
        for reason, drop in _by_count(source["dropped"])
    ]
    if drops:
        sections += ["## Dropped rows", _table(("source", "reason", "rows", "share"), drops, 2)]
    for source in sources:
        for reason, drop in _by_count(source["dropped"]):
            sections += _examples(_name(source), reason, drop)
    return "\n\n".join(sections) + "\n"


def _rows_table(sources: Sequence[Mapping[str, Any]]) -> str:
    counts = [
        [source["rows"], source["kept"], source["truncated"], sum(drop["count"] for drop in source["dropped"].values())]
        for source in sources
    ]
    lines = [
        (_name(source), source["format"], *(f"{count:,}" for count in own))
        for source, own in zip(sources, counts, strict=True)
    ]
    if len(lines) > 1:
        lines.append(("all", "", *(f"{sum(column):,}" for column in zip(*counts, strict=True))))
    return _table(("source", "format", "rows", "kept", "truncated", "dropped"), lines, 2)


def _tokens_table(sources: Sequence[Mapping[str, Any]]) -> str:
    quantiles = list(dict.fromkeys(name for source in sources for name in source["length_quantiles"]))
    lines = []
    for source in sources:
        share = _percent(source["supervised_tokens"], source["tokens"])
        own = [source["length_quantiles"].get(name) for name in quantiles]
        lengths = ("–" if length is None else f"{length:,}" for length in own)
        lines.append((_name(source), f"{source['tokens']:,}", f"{source['supervised_tokens']:,}", share, *lengths))
    if len(lines) > 1:
        tokens, supervised = (sum(source[key] for source in sources) for key in ("tokens", "supervised_tokens"))
        share = _percent(supervised, tokens)
        lines.append(("all", f"{tokens:,}", f"{supervised:,}", share, *("" for _ in quantiles)))
    return _table(("source", "tokens", "supervised", "share", *quantiles), lines, 1)


def _table(head: Sequence[str], lines: Iterable[Sequence[str]], text_columns: int) -> str:
    """A markdown table whose first columns are text, the others numbers."""
    rule = ["---"] * text_columns + ["--:"] * (len(head) - text_columns)
    cells = [head, rule, *([_escaped(cell) for cell in line] for line in lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _examples(source: str, reason: str, drop: Mapping[str, Any]) -> list[str]:
    """A heading, and each row's problem and content."""
    shown = drop["examples"]
    sections = [f"### {_escaped(source)}: {_escaped(reason)}"] if shown else []
    for example in shown:
        sections += [f"Row {example['row']:,}: {_escaped(example['problem'])}", _fenced(example["content"])]
    return sections


def _fenced(content: str) -> str:
    """A code block that the content cannot end."""
    more = len(content) - CONTENT_SHOWN
    text = printable(content[:CONTENT_SHOWN]) + (f" … ({more:,} characters more)" if more > 0 else "")
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _escaped(text: str) -> str:
    """Text for a table's cell or a paragraph: one line, in which no sign is markdown's."""
    return re.sub(r"([\\`*_~\[\]<>#|$&!])", r"\\\1", _one_line(text))


def _one_line(text: str) -> str:
    return " ".join(printable(text).split())


# --- figures ----------------------------------------------------------------------------------------------------------


def _name(source: Mapping[str, Any]) -> str:
    return f"{source['name']}[{source['split']}]" if source["split"] else str(source["name"])


def _by_count(dropped: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(dropped.items(), key=lambda item: -item[1]["count"])


def _filled(rows: int, seq_len: int, tokens: int) -> str:
    return f"an epoch is {rows:,} rows of {seq_len:,} tokens, {_percent(tokens, rows * seq_len)} full"


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _percent(part: int, whole: int) -> str:
    return f"{100 * _ratio(part, whole):.1f} %"


# --- picture ----------------------------------------------------------------------------------------------------------


def _plot_lengths(
    names: Sequence[str], lengths: NDArray[np.int64], source_of: NDArray[np.int16], seq_len: int, path: Path
) -> None:
    """Histogram of the samples' lengths by source, on a logarithmic scale of lengths."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    lowest, highest = int(lengths.min(initial=seq_len)), int(lengths.max(initial=seq_len))
    # whole lengths in each bin: narrower ones would be empty by turns
    edges = np.unique(np.geomspace(max(lowest, 1), highest + 1, _BINS + 1).round()) - 0.5
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    sizes = np.bincount(source_of, minlength=len(names))
    for source, name in enumerate(names):
        counts, _ = np.histogram(lengths[source_of == source], edges)
        label = f"{printable(name)}: {sizes[source]:,} samples".replace("$", r"\$")
        axes.stairs(counts, edges, fill=True, alpha=0.3, color=f"C{source % 10}")
        axes.stairs(counts, edges, linewidth=1.2, color=f"C{source % 10}", label=label)
    axes.axvline(seq_len, color="crimson", linestyle="--", linewidth=1.2, label=f"row of {seq_len:,} tokens")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    present = sizes[sizes > 0]
    if len(present) and present.max() >= _LOG_COUNTS_FROM * present.min():
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7)
    axes.set(title="Lengths of the samples", xlabel="tokens of a sample", ylabel="samples")
    axes.grid(visible=True, alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(path)
