"""The pictures of a run's page, each for a light and a dark ground."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from numina_finetune.run_report.gather import RunAccount
from numina_finetune.train.metrics import Record, life_of
from numina_finetune.train.plots import lives_of, smooth

MOST_POINTS = 4000
"""Drawn of a curve; of longer ones every n-th."""
_GROUNDS = {"light": ("#ffffff", "#1f2328"), "dark": ("#161b22", "#d7dde3")}
"""Ground and ink."""
_CURVE, _ACCENT = "#3b82c4", "#d1495b"
"""Seen on both grounds."""


@dataclass(frozen=True)
class Picture:
    """A figure with its title; PNGs as ``data:`` addresses."""

    title: str
    caption: str
    light: str
    dark: str


def pictures(run: RunAccount) -> list[Picture]:
    """Those that the run has something to show in."""
    steps, metrics = run.metrics.steps, run.metrics
    drawn: list[tuple[bool, str, str, Callable[[Any, str], None]]] = [
        (
            bool(steps),
            "Training loss",
            "Mean over the step's supervised tokens (nats); a colour a life, the strong line their smoothed course, "
            "squares the evaluation loss, triangles steps whose loss stood out.",
            lambda axes, ink: _loss(axes, run, ink),
        ),
        (
            any("eval_accuracy" in record for record in metrics.evaluations),
            "Evaluation accuracy",
            "With its 95% interval where there is one.",
            lambda axes, ink: _accuracy(axes, metrics.evaluations),
        ),
        (
            bool(steps),
            "Learning rate",
            "",
            lambda axes, ink: _curve(axes, steps, "learning_rate"),
        ),
        (
            bool(steps),
            "Gradient norm",
            "Before clipping; crosses: steps that were skipped as not finite, triangles: those whose norm stood out.",
            lambda axes, ink: _norm(axes, run),
        ),
        (
            any("noise_scale_rows" in record for record in steps),
            "Gradient noise scale",
            "Rows a step above which more of them help less and less (McCandlish et al., 2018), over the last steps.",
            lambda axes, ink: _curve(axes, steps, "noise_scale_rows"),
        ),
        (
            any("seconds_per_step" in record for record in steps),
            "Time of a step",
            "Seconds by the clock, the mean between two log lines; dashed lines: a life begins (and compiles).",
            lambda axes, ink: _step_time(axes, steps, ink),
        ),
        (
            any("tokens_per_second" in record for record in steps),
            "Speed",
            "Tokens a second that are not padding.",
            lambda axes, ink: _curve(axes, steps, "tokens_per_second"),
        ),
        (
            bool(metrics.checkpoints),
            "Checkpoints",
            "Seconds that training stood still for each, and those until it was committed in the background.",
            lambda axes, ink: _checkpoints(axes, metrics.checkpoints),
        ),
        (
            bool(run.data and run.data.get("sources")),
            "Data",
            "Tokens by source, and how many of them have a loss.",
            lambda axes, ink: _data(axes, run.data or {}),
        ),
    ]
    return [
        Picture(title, caption, *(_png(draw, ground) for ground in ("light", "dark")))
        for there, title, caption, draw in drawn
        if there
    ]


def _png(draw: Callable[[Any, str], None], ground: str) -> str:
    """The picture as a ``data:`` address."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    paper, ink = _GROUNDS[ground]
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    papered = ("figure.facecolor", "axes.facecolor", "legend.facecolor", "savefig.facecolor")
    colors: dict[Any, Any] = {**dict.fromkeys(inked, ink), **dict.fromkeys(papered, paper)}
    with rc_context(colors):
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        axes = figure.subplots()
        draw(axes, ink)
        axes.grid(visible=True, alpha=0.15)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _loss(axes: Any, run: RunAccount, ink: str) -> None:
    steps = run.metrics.steps
    for place, life in enumerate(lives_of(steps)):
        at, losses = _thin(life.steps), _thin(life.losses)
        axes.plot(at, losses, color=f"C{place % 10}", alpha=0.55, linewidth=0.9, label=f"life {life.number}")
    smoothed = smooth(np.array([float(record["loss"]) for record in steps]))
    axes.plot(_thin(_at(steps)), _thin(smoothed), color=ink, linewidth=1.5)
    evaluated = [record for record in run.metrics.evaluations if "eval_loss" in record]
    if evaluated:
        values = [record["eval_loss"] for record in evaluated]
        axes.plot(_at(evaluated), values, "s-", color=_ACCENT, markersize=5, label="evaluation")
    _mark_spikes(axes, run, "loss", "loss")
    axes.set(xlabel="optimizer step", ylabel="loss", yscale="log")
    axes.legend(loc="upper right", fontsize="small")


def _accuracy(axes: Any, evaluations: Sequence[Record]) -> None:
    rows = [record for record in evaluations if "eval_accuracy" in record]
    values = np.array([record["eval_accuracy"] for record in rows])
    ends = [
        np.array([record.get(f"eval_accuracy_{end}", record["eval_accuracy"]) for record in rows])
        for end in ("lower", "upper")
    ]
    axes.errorbar(_at(rows), values, yerr=np.abs(np.stack(ends) - values), fmt="o-", color=_CURVE, capsize=3)
    axes.set(xlabel="optimizer step", ylabel="accuracy", ylim=(0, 1))


def _curve(axes: Any, steps: Sequence[Record], name: str) -> None:
    rows = [record for record in steps if name in record]
    axes.plot(_thin(_at(rows)), _thin([record[name] for record in rows]), color=_CURVE, linewidth=1.3)
    axes.set(xlabel="optimizer step", ylabel=name.replace("_", " "))


def _norm(axes: Any, run: RunAccount) -> None:
    rows = [record for record in run.metrics.steps if np.isfinite(record.get("grad_norm", np.nan))]
    if rows:
        axes.plot(_thin(_at(rows)), _thin([record["grad_norm"] for record in rows]), color=_CURVE, linewidth=1.0)
        axes.set_yscale("log")
    _mark_spikes(axes, run, "gradient norm", "grad_norm")
    for place, step in enumerate(run.skipped):
        label = f"{len(run.skipped)} skipped" if place == 0 else None
        axes.plot([step], [0.03], "x", color=_ACCENT, transform=axes.get_xaxis_transform(), label=label)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="upper right", fontsize="small")
    axes.set(xlabel="optimizer step", ylabel="global norm")


def _mark_spikes(axes: Any, run: RunAccount, what: str, name: str) -> None:
    """Triangles at the steps that stood out by ``what``, whose value their records call ``name``."""
    found = [record for record in run.metrics.spikes if what in record["spike"]["above"]]
    if found:
        values = [record["spike"][name] for record in found]
        axes.plot(_at(found), values, "v", color=_ACCENT, markersize=5, label=f"{len(found)} stood out")


def _step_time(axes: Any, steps: Sequence[Record], ink: str) -> None:
    _curve(axes, [record for record in steps if record.get("seconds_per_step", 0) > 0], "seconds_per_step")
    for _, own in groupby(steps, key=life_of):
        axes.axvline(int(next(own)["step"]), color=ink, linestyle="--", linewidth=0.8, alpha=0.5)
    axes.set(ylabel="seconds", yscale="log")


def _checkpoints(axes: Any, checkpoints: Sequence[Record]) -> None:
    at = [str(record["step"]) for record in checkpoints]
    stalls, totals = (
        [float(record["checkpoint"][name]) for record in checkpoints] for name in ("stall_seconds", "total_seconds")
    )
    place = np.arange(len(at))
    axes.bar(place, totals, color=_CURVE, alpha=0.4, label="until committed")
    axes.bar(place, stalls, color=_ACCENT, width=0.5, label="training stood still")
    shown = place[:: max(1, len(at) // 12)]
    axes.set_xticks(shown, [at[index] for index in shown])
    axes.set(xlabel="step of the checkpoint", ylabel="seconds")
    axes.legend(fontsize="small")


def _data(axes: Any, data: Any) -> None:
    sources = data["sources"][::-1]
    names = [f"{source['name']}[{source['split']}]" for source in sources]
    place = np.arange(len(sources))
    axes.barh(place, [source["tokens"] for source in sources], color=_CURVE, alpha=0.4, label="tokens")
    supervised = [source["supervised_tokens"] for source in sources]
    axes.barh(place, supervised, color=_CURVE, height=0.5, label="of them supervised")
    axes.set_yticks(place, names)
    axes.set_ylim(-0.8, len(sources) - 0.2)
    axes.set(xlabel="tokens")
    axes.legend(fontsize="small")


def _at(records: Sequence[Record]) -> list[int]:
    return [int(record["step"]) for record in records]


def _thin(values: Any) -> Any:
    return values[:: max(1, len(values) // MOST_POINTS)]
