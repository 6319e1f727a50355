"""What a sweep leaves: a ranked table, ``sweep.json``, a picture, and the command of the winner."""

from __future__ import annotations

import io
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from numina_finetune.run_report.gather import gather
from numina_finetune.sweep.standing import Ranking, Standing, ranking
from numina_finetune.sweep.trials import Trial
from numina_finetune.train.plots import smooth

RESULTS = "sweep.json"
PICTURE = "sweep.png"
FORMAT = 1
"""Raised where an older reader could not read what is written."""
_FIGURES = {"loss": "train loss", "eval_loss": "eval loss", "eval_accuracy": "accuracy"}


def results_of(trials: Sequence[Trial], standings: Sequence[Standing], training: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``sweep.json``.

    Args:
        training: what all trials have in common, as `common_settings` gives it.
    """
    ranked = ranking(standings)
    best = ranked.order[0] if ranked.order else None
    return {
        "format": FORMAT,
        "training": dict(training),
        "trials": [asdict(standing) for standing in standings],
        "ranked_by": ranked.by,
        "ranking": [standing.rate for standing in ranked.order],
        "winner": None
        if best is None
        else {"rate": best.rate, "run": best.run, "command": command_of(_of_rate(trials, best.rate))},
        "advice": advice_of(standings, ranked),
    }


def command_of(trial: Trial) -> str:
    """The trial's command line, as a shell takes it."""
    return shlex.join(["numina-finetune", *trial.words])


def advice_of(standings: Sequence[Standing], ranked: Ranking) -> str:
    """What to try next, in a sentence."""
    if not ranked.order:
        gone = bool(standings) and all(each.outcome == "diverged" for each in standings)
        return "every rate diverged: try lower ones" if gone else "no trial has finished yet"
    if open_ := [each for each in standings if not each.finished]:
        return f"{len(open_)} of {len(standings)} trials have not finished: run the same command again"
    best, rates = ranked.order[0].rate, [each.rate for each in standings]
    if len(ranked.order) == 1:
        return "only one rate trained to the end: try more of them"
    if best == max(rates):
        return f"the best rate, {best:g}, is the largest tried: try higher ones"
    if best == min(rates):
        return f"the best rate, {best:g}, is the smallest tried: try lower ones"
    return f"the best rate, {best:g}, lies between others that were tried"


def table_of(standings: Sequence[Standing]) -> str:
    """For a person: the ranking, and then what was not ranked."""
    ranked = ranking(standings)
    places = {each.rate: place for place, each in enumerate(ranked.order, 1)}
    rows = [("", "rate", "outcome", "step", *_FIGURES.values(), "seconds")]
    for each in (*ranked.order, *(each for each in standings if each.rate not in places)):
        figures = (getattr(each, name) for name in _FIGURES)
        shown = ("-" if value is None else f"{value:.4f}" for value in figures)
        place = str(places.get(each.rate, ""))
        rows.append((place, f"{each.rate:g}", each.outcome, str(each.step), *shown, f"{each.seconds:.0f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, f"ranked by {ranked.words}"])


def draw(trials: Sequence[Trial], standings: Sequence[Standing]) -> bytes:
    """Loss against rate, and every trial's course, side by side; PNG."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    against, courses = figure.subplots(1, 2)
    colors = dict(
        zip((each.rate for each in standings), colormaps["viridis"](np.linspace(0, 0.9, len(standings))), strict=True)
    )
    ranked = ranking(standings)
    _draw_against(against, standings, ranked, colors)
    for trial, standing in zip(trials, standings, strict=True):
        steps = gather(trial.store).metrics.steps
        if steps:
            losses = np.array([float(record["loss"]) for record in steps])
            label = f"{trial.rate:g}" + ("" if standing.outcome == "done" else f" ({standing.outcome})")
            at = [int(record["step"]) for record in steps]
            courses.plot(at, losses, color=colors[trial.rate], alpha=0.25, linewidth=0.7)
            courses.plot(at, smooth(losses), color=colors[trial.rate], linewidth=1.6, label=label)
    courses.set(xlabel="optimizer step", ylabel="loss per supervised token (nats), smoothed", title="Trials")
    if courses.has_data():
        courses.set_yscale("log")
        courses.legend(title="learning rate")
    for axes in (against, courses):
        axes.grid(visible=True, which="both", alpha=0.25)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _draw_against(axes: Any, standings: Sequence[Standing], ranked: Ranking, colors: Mapping[float, Any]) -> None:
    """The losses of those that are done by rate; where the others were tried is marked at the top."""
    done = sorted(ranked.order, key=lambda each: each.rate)
    for name, style in (("loss", "o--"), ("eval_loss", "s-")):
        points = [(each.rate, getattr(each, name)) for each in done if getattr(each, name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, color="0.35", label=_FIGURES[name], zorder=1)
            axes.scatter(*zip(*points, strict=True), color=[colors[rate] for rate, _ in points], zorder=2)
    others = [each for each in standings if each not in done and each.outcome != "not run"]
    for each in others:
        axes.axvline(each.rate, color="crimson", linestyle=":", linewidth=1.2)
        axes.annotate(
            each.outcome, (each.rate, 0.98), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right",
            color="crimson",
        )  # fmt: skip
    if done:
        axes.axvline(
            ranked.order[0].rate, color="0.35", linewidth=0.8, alpha=0.6, label=f"best: {ranked.order[0].rate:g}"
        )
        axes.legend()
    axes.set_xscale("log")
    axes.set(xlabel="learning rate", ylabel="loss per supervised token (nats)", title="Loss against learning rate")


def _of_rate(trials: Sequence[Trial], rate: float) -> Trial:
    return next(trial for trial in trials if trial.rate == rate)
