"""A run's page: one HTML file that needs nothing else, readable on a light and on a dark ground."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from numina_finetune import __version__
from numina_finetune.run_report.curves import pictures
from numina_finetune.run_report.gather import RunAccount
from numina_finetune.train.display import clock

_TEMPLATE = Path(__file__).with_name("page.html.jinja")
_NONE = "–"


@dataclass(frozen=True)
class Table:
    """Rows of text under a head."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int] = ()
    """Columns that line up at their right."""
    caption: str = ""


def page(run: RunAccount) -> str:
    """The whole page."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATE.parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    config = run.record.get("config", {})
    name = run.record.get("run_id") or run.place.rstrip("/").rsplit("/", 1)[-1]
    return environment.get_template(_TEMPLATE.name).render(
        title=f"Run {name}",
        place=run.place,
        missing=run.missing,
        facts=_facts(run, config),
        pictures=pictures(run),
        tables=[table for table in _tables(run) if table.rows],
        settings=yaml.safe_dump(config, sort_keys=False, allow_unicode=True) if config else "",
        footer=f"Written by numina_finetune {__version__} at {_time(datetime.now(UTC).timestamp())}.",
    )


def _facts(run: RunAccount, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The few figures that are looked for first."""
    steps, metrics = run.metrics.steps, run.metrics
    facts = [("model", str(config["model_name"]))] if "model_name" in config else []
    total = f" of {run.total_steps:,}" if run.total_steps else ""
    facts.append(("optimizer steps", f"{int(steps[-1]['step']) if steps else 0:,}{total}"))
    if steps:
        facts.append(("tokens trained on", f"{sum(int(record.get('tokens', 0)) for record in steps):,}"))
        facts.append(("last training loss", f"{steps[-1]['loss']:.4f}"))
    for key, told, form in (("eval_loss", "evaluation loss", "{:.4f}"), ("eval_accuracy", "accuracy", "{:.1%}")):
        values = [record for record in metrics.evaluations if key in record]
        if values:
            last = values[-1]
            facts.append((f"{told} after step {last['step']}", form.format(last[key])))
    speeds = [record["tokens_per_second"] for record in steps if "tokens_per_second" in record]
    if speeds:
        facts.append(("tokens a second, median", f"{median(speeds):,.0f}"))
    mfus = [record["mfu"] for record in steps if "mfu" in record]
    if mfus:
        facts.append(("MFU, median", f"{median(mfus):.1%}"))
    if run.lives:
        facts.append(("lives", str(len(run.lives))))
        facts.append(("the last one ended", run.lives[-1].kind))
    if run.goodput is not None:
        facts.append(("goodput", f"{run.goodput:.1%}"))
    if steps:
        facts.append(("steps skipped as not finite", str(len(run.skipped))))
        facts.append(("steps that stood out", str(len(metrics.spikes))))
    scales = [record["noise_scale_rows"] for record in steps if "noise_scale_rows" in record]
    if scales:
        facts.append(("gradient noise scale, rows", f"{scales[-1]:,.0f}"))
    return facts


def _tables(run: RunAccount) -> list[Table]:
    return [_lives(run), _evaluations(run), _spikes(run), _checkpoints(run), _data(run), _versions(run.record)]


def _lives(run: RunAccount) -> Table:
    rows = [
        (
            str(life.number),
            _time(life.began),
            _NONE if life.wall is None else clock(life.wall),
            life.kind,
            _NONE if life.first_step is None else f"{life.first_step} to {life.last_step}",
            _or_none(life.saved_step),
            f"{life.lost_steps} ({life.lost_seconds:.1f} s)" if life.lost_steps else "0",
            *(f"{life.seconds[name]:.1f}" if name in life.seconds else _NONE for name in ("save", "restore")),
            life.host,
            life.reason,
        )
        for life in run.lives
    ]
    head = ("life", "began (UTC)", "took", "outcome", "steps", "saved", "lost steps", "save s", "restore s", "host")
    return Table(
        "Lives",
        (*head, "reason"),
        rows,
        numbers=(0, 2, 5, 6, 7, 8),
        caption="Steps: those that count. Lost: made after the last checkpoint and made again by a later life, as far "
        "as they were logged. A life without an outcome lasted at least until its last known record. Goodput: the "
        "steps that count, each at its life's median time, over the time of all lives.",
    )


def _evaluations(run: RunAccount) -> Table:
    names = ("eval_loss", "eval_tokens", "eval_accuracy", "eval_accuracy_lower", "eval_accuracy_upper", "eval_problems")
    there = [name for name in names if any(name in record for record in run.metrics.evaluations)]
    rows = [(str(record["step"]), *(_number(record.get(name)) for name in there)) for record in run.metrics.evaluations]
    head = ("step", *(name.removeprefix("eval_").replace("_", " ") for name in there))
    return Table("Evaluations", head, rows, numbers=range(len(head)))


def _spikes(run: RunAccount) -> Table:
    names = ("loss", "usual_loss", "grad_norm", "usual_grad_norm")
    rows = [
        (
            str(record["step"]),
            *(f"{record['spike'][name]:.4g}" for name in names),
            " and ".join(record["spike"]["above"]),
            " to ".join(f"{row:,}" for row in record["spike"]["rows"]),
        )
        for record in run.metrics.spikes
    ]
    return Table(
        "Steps that stood out",
        ("step", "loss", "usual", "gradient norm", "usual", "far above it", "rows of the data"),
        rows,
        numbers=range(5),
        caption="Usual: the median of the steps before. Rows are counted from 0, from the start of the run.",
    )


def _checkpoints(run: RunAccount) -> Table:
    rows = [
        (
            str(record["step"]),
            _or_none(record.get("life")),
            f"{record['checkpoint']['stall_seconds']:.2f}",
            f"{record['checkpoint']['total_seconds']:.2f}",
            f"{record['checkpoint']['bytes'] / 1e9:.3f}",
        )
        for record in run.metrics.checkpoints
    ]
    head = ("step", "life", "training stood still, s", "until committed, s", "GB")
    return Table("Checkpoints saved", head, rows, numbers=range(5))


def _data(run: RunAccount) -> Table:
    sources = (run.data or {}).get("sources", [])
    whole = sum(source["tokens"] for source in sources) or 1
    rows = []
    for source in sources:
        dropped = sorted(source["dropped"].items(), key=lambda item: -int(item[1]["count"]))
        reasons = "; ".join(f"{drop['count']:,} {reason}" for reason, drop in dropped[:3])
        counts = (f"{source[name]:,}" for name in ("rows", "kept", "tokens", "supervised_tokens"))
        told = (f"{source['name']}[{source['split']}]", str(source["format"]))
        rows.append((*told, *counts, f"{source['tokens'] / whole:.1%}", reasons or "none"))
    head = ("source", "format", "rows", "kept", "tokens", "supervised", "share of tokens", "dropped")
    weights = run.record.get("config", {}).get("datasets", [])
    given = [f"{source['name']} {source['weight']:g}" for source in weights if source.get("weight") is not None]
    key = f"Data key {run.data['data_key']}. " if run.data and "data_key" in run.data else ""
    return Table(
        "Data", head, rows, numbers=range(2, 7), caption=key + (f"Weights: {', '.join(given)}." if given else "")
    )


def _versions(record: Mapping[str, Any]) -> Table:
    rows = [(name, str(version)) for name, version in (record.get("versions") or {}).items()]
    if git := record.get("git"):
        rows.append(("git commit where it was started", git["commit"] + (", with changes" if git["dirty"] else "")))
    return Table("Versions", ("library", "version"), rows)


def _time(seconds: float | None) -> str:
    return _NONE if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"


def _number(value: Any) -> str:
    if value is None:
        return _NONE
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


def _or_none(value: Any) -> str:
    return _NONE if value is None else str(value)
