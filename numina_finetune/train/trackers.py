"""Trackers (wandb, TensorBoard), through Accelerate: one run of theirs for all lives of ours; no reason to die.

- **One run.** wandb's id follows from the run's place and the start of its first life: every life continues it
  (``resume="allow"``), and a run that was deleted and begun anew is another. TensorBoard's files of all lives lie in
  one folder; each life tells readers to forget what an earlier one wrote of the steps that are made again.
- **Steps never go backwards.** What wandb already has of the steps that a resumed life makes again stays as it is: on
  the same mesh the new values are the same, bit for bit. The life is heard again from the first step that wandb lacks.
- **Faults.** A tracker that cannot start or log is given up with one warning; ``metrics.jsonl`` has everything.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from numina_finetune.checkpoint.attempts import ATTEMPTS, STARTED, attempt_numbers
from numina_finetune.config import RunConfig
from numina_finetune.storage import Store
from numina_finetune.train.provenance import git_state, redacted, versions

logger = logging.getLogger(__name__)

TENSORBOARD = "tensorboard"
"""Folder of TensorBoard's files in the run's folder."""
DEFAULT_PROJECT = "numina_finetune"
CLOSING_SECONDS = 30.0
"""How long a tracker may take to send its last values, where no machine is about to go."""


@dataclass(frozen=True)
class TrackedLife:
    """What the trackers are told of one life of a run."""

    config: RunConfig
    folder: Path
    """The run's on this machine."""
    run_key: str
    """`tracker_run_key`."""
    step: int
    """Optimizer steps that were made when it began."""
    facts: Mapping[str, Any]
    """`tracked_facts`."""


def missing_trackers(config: RunConfig) -> list[str]:
    """Faults: the trackers that are asked for and not installed."""
    return [
        f"--report-to {name} needs the package {name}, which is not installed: "
        "pip install 'numina_finetune[train]', or leave it out"
        for name in config.trackers
        if importlib.util.find_spec(name) is None
    ]


def wandb_project(config: RunConfig) -> str:
    """The project that the run belongs to."""
    return config.tracker_project or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT


def tracker_run_key(store: Store) -> str:
    """A name for the run that every life of it finds, in letters that trackers take for an id.

    Args:
        store: the run's place, in which its first life has begun.
    """
    first = min(attempt_numbers(store))
    place = store.url if store.url.startswith("gs://") else str(Path(store.url).resolve())
    digest = hashlib.sha256(place.encode() + store.read(f"{ATTEMPTS}/{first}/{STARTED}")).hexdigest()[:12]
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", place.rstrip("/").rsplit("/", 1)[-1])
    return f"{name[:40]}-{digest}"


def tracked_facts(config: RunConfig, report: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without secrets, what became of the data, versions and the user's commit: what a tracker keeps of a run.

    Args:
        report: a token index's data report; its examples of rows stay here.
    """
    sources = [
        {
            **{name: source[name] for name in ("name", "split", "format", "rows", "kept", "tokens")},
            "dropped": sum(drop["count"] for drop in source["dropped"].values()),
        }
        for source in report["sources"]
    ]
    data = {**{name: report[name] for name in ("data_key", "kept", "tokens", "supervised_tokens")}, "sources": sources}
    return {"config": redacted(config.to_mapping()), "data": data, "versions": versions(), "git": git_state()}


def start_trackers(accelerator: Accelerator, life: TrackedLife) -> None:
    """Start what ``--report-to`` names; ``accelerator.log`` reaches it from then on, on process 0."""
    make = {"wandb": _Wandb, "tensorboard": _TensorBoard}
    accelerator.log_with = [make[name](life) for name in life.config.trackers]
    accelerator.init_trackers(DEFAULT_PROJECT)


def close_trackers(accelerator: Accelerator, left: float | None) -> None:
    """Send what is left. The processes' group, which ``end_training`` would destroy, is needed for the export.

    Args:
        left: seconds until the machine goes; None where it does not. What comes after has half of them.
    """
    patience = CLOSING_SECONDS if left is None else min(left / 2, CLOSING_SECONDS)
    for tracker in accelerator.trackers:
        last = threading.Thread(target=tracker.finish, daemon=True, name="tracker-finish")
        last.start()
        last.join(patience)
        if last.is_alive():
            logger.warning("%s: still sending after %.0f s: left to itself", tracker.name, patience)
    accelerator.trackers.clear()


class _Tolerant(GeneralTracker):  # type: ignore[misc]
    """One of Accelerate's own trackers, whose faults end the tracking and not the training."""

    requires_logging_directory = False
    name = ""

    def __init__(self, inner: GeneralTracker, life: TrackedLife) -> None:
        super().__init__()
        self._inner, self._life, self._lost = inner, life, False

    @property
    def tracker(self) -> Any:
        return self._inner.tracker

    def start(self) -> None:
        self._attempt(self._start)

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self._attempt(lambda: self._log(values, step))

    def finish(self) -> None:
        self._attempt(self._inner.finish)

    def _start(self) -> None:
        self._inner.start()

    def _log(self, values: dict[str, Any], step: int | None) -> None:
        self._inner.log(values, step=step)

    def _attempt(self, action: Callable[[], None]) -> None:
        if self._lost:
            return
        try:
            action()
        except Exception as error:
            self._lost = True
            logger.warning(
                "--report-to %s failed (%s: %s): going on without it; metrics.jsonl has everything",
                *(self.name, type(error).__name__, str(error).strip() or "no reason given"),
            )


class _Wandb(_Tolerant):
    name = "wandb"

    def __init__(self, life: TrackedLife) -> None:
        config = life.config
        # What is not said here, wandb takes from its own variables: WANDB_MODE, WANDB_RUN_GROUP, WANDB_DIR, …
        group = {"group": config.tracker_group} if config.tracker_group else {}
        folder = {} if os.environ.get("WANDB_DIR") else {"dir": str(life.folder)}
        project = wandb_project(config)
        # wandb notes the command line by itself, with whatever stands in it.
        quiet = {"settings": {"x_disable_meta": True}} if redacted(sys.argv) != sys.argv else {}
        options = {"id": life.run_key, "name": config.resolved_run_id, "resume": "allow", **group, **folder, **quiet}
        super().__init__(WandBTracker(project, **options), life)
        self._first = 0

    def _start(self) -> None:
        self._inner.start()
        self._first = self._inner.run.step
        self._inner.store_init_configuration(dict(self._life.facts))

    def _log(self, values: dict[str, Any], step: int | None) -> None:
        if step is None or step >= self._first:
            self._inner.log(values, step=step)


class _TensorBoard(_Tolerant):
    name = "tensorboard"

    def __init__(self, life: TrackedLife) -> None:
        # Accelerate's first argument names the folder within the second one.
        super().__init__(TensorBoardTracker(TENSORBOARD, life.folder, purge_step=life.step + 1), life)

    def _start(self) -> None:
        self._inner.start()
        facts = yaml.safe_dump(dict(self._life.facts), sort_keys=False, allow_unicode=True)
        self._inner.writer.add_text("run", f"```yaml\n{facts}```", self._life.step)
