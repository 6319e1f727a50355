"""What became of each trial so far, read from its own folder, and the order of those that finished."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from numina_finetune.run_report.gather import NO_OUTCOME, LifeAccount, gather
from numina_finetune.storage import NotFound
from numina_finetune.sweep.divergence import Divergence
from numina_finetune.sweep.trials import Trial
from numina_finetune.train.metrics import Metrics

DIVERGED = "diverged.json"
"""In the run's folder: why the sweep gave the trial up, and of which settings."""
LAST_PART = 0.1
"""Share of the steps, the last ones, over which the training loss is averaged for the ranking."""


@dataclass(frozen=True)
class Standing:
    """A trial as it stands."""

    rate: float
    name: str
    run: str
    """Its folder, or ``gs://…``."""
    outcome: str
    """``done``, ``diverged``, ``unfinished`` (it will be resumed), ``crashed``, ``configuration`` or ``not run``."""
    reason: str | None
    step: int
    """Steps on record; of a diverged trial, the step at which it was."""
    loss: float | None
    """Mean training loss over the last tenth of its steps."""
    eval_loss: float | None
    eval_accuracy: float | None
    seconds: float
    """Of all its lives, from their start to their end, as far as that is known of a life that was killed."""

    @property
    def finished(self) -> bool:
        """Whether it need not be run again."""
        return self.outcome in ("done", "diverged")


@dataclass(frozen=True)
class Ranking:
    """The trials that are done, the best first, and by which figure."""

    by: str
    order: Sequence[Standing]

    @property
    def words(self) -> str:
        return {
            "eval_accuracy": "accuracy in the last evaluation, then its loss",
            "eval_loss": "loss in the last evaluation",
            "loss": f"mean training loss over the last {LAST_PART:.0%} of the steps",
        }[self.by]


def standing_of(trial: Trial) -> Standing:
    """Look into the trial's folder."""
    run = gather(trial.store)
    metrics, given_up = run.metrics, _given_up(trial)
    outcome, reason = _outcome(run.lives, given_up)
    tail = metrics.steps[-max(1, round(LAST_PART * len(metrics.steps))) :]
    return Standing(
        rate=trial.rate,
        name=trial.name,
        run=trial.config.run_url,
        outcome=outcome,
        reason=reason,
        step=given_up.step if given_up else max((int(record["step"]) for record in metrics.steps), default=0),
        loss=_finite(math.fsum(record["loss"] for record in tail) / len(tail)) if tail else None,
        eval_loss=_last(metrics, "eval_loss"),
        eval_accuracy=_last(metrics, "eval_accuracy"),
        seconds=round(sum(life.wall or 0.0 for life in run.lives), 1),
    )


def give_up(trial: Trial, found: Divergence) -> None:
    """Record that the trial diverged, so that no later sweep runs it again."""
    trial.store.write_json(DIVERGED, {**asdict(found), "settings": trial.settings})


def ranking(standings: Sequence[Standing]) -> Ranking:
    """Order those that are done: by accuracy or evaluation loss where all of them have it, else by training loss."""
    done = [each for each in standings if each.outcome == "done"]
    keys: dict[str, Callable[[Standing], tuple[float, ...]]] = {
        "eval_accuracy": lambda each: (-_known(each.eval_accuracy), _known(each.eval_loss), _known(each.loss)),
        "eval_loss": lambda each: (_known(each.eval_loss), _known(each.loss)),
        "loss": lambda each: (_known(each.loss),),
    }
    by = next(
        name for name in keys if name == "loss" or (done and all(getattr(each, name) is not None for each in done))
    )
    return Ranking(by, sorted(done, key=keys[by]))


def _outcome(lives: Sequence[LifeAccount], given_up: Divergence | None) -> tuple[str, str | None]:
    """Of the whole trial, and why it is not done."""
    last = lives[-1] if lives else None
    if last and last.kind == "done":
        return "done", None
    if given_up:
        return "diverged", given_up.reason
    if last is None:
        return "not run", None
    kind = {"preempted": "unfinished", "stopped": "unfinished", NO_OUTCOME: "unfinished"}.get(last.kind, last.kind)
    return kind, last.reason or "killed, or still running"


def _given_up(trial: Trial) -> Divergence | None:
    try:
        said = json.loads(trial.store.read(DIVERGED))
    except NotFound:
        return None
    return Divergence(int(said["step"]), said["reason"]) if said["settings"] == trial.settings else None


def _last(metrics: Metrics, name: str) -> float | None:
    values = [record[name] for record in metrics.evaluations if name in record]
    return _finite(values[-1]) if values else None


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _known(value: float | None) -> float:
    """What is not known ranks last."""
    return math.inf if value is None else value
