"""The trials as processes: started in turn or side by side, watched, stopped early, and told of every notice."""

from __future__ import annotations

import logging
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from numina_finetune.claims import lock_folder
from numina_finetune.errors import ExitCode
from numina_finetune.process_tree import Children, exit_code_of
from numina_finetune.sweep.divergence import Criteria, divergence
from numina_finetune.sweep.standing import Standing, give_up, standing_of
from numina_finetune.sweep.trials import Trial
from numina_finetune.train.metrics import parse_metrics
from numina_finetune.train.place import METRICS

logger = logging.getLogger(__name__)

LOCK = "sweep.lock"
POLL_SECONDS = 0.2
TOLD_EVERY = 30.0
"""Seconds between two lines about a running trial."""
STOP_PATIENCE = 120.0
"""Seconds that a trial which was given up may take to end before it is killed."""
TAIL_LINES = 8
"""Of a failed trial's output, which are shown."""


@dataclass
class _Running:
    trial: Trial
    process: subprocess.Popen[bytes]
    told: float
    size: int = -1
    """Of ``metrics.jsonl`` when it was last looked at."""
    given_up: float | None = None
    """When it was told to stop because it was diverging."""

    @property
    def metrics(self) -> Path:
        return self.trial.config.run_dir / METRICS


class Runner:
    """Runs trials; knows the notices that came meanwhile."""

    def __init__(self, lock: int, criteria: Criteria) -> None:
        """``lock``: the descriptor of `sweep_lock`, which the trials hold too."""
        self._children, self._criteria = Children(lock), criteria
        self._running: list[_Running] = []

    @property
    def signal(self) -> int | None:
        """The notice that stops the sweep."""
        return self._children.signal

    def listening(self) -> AbstractContextManager[None]:
        """Passes SIGTERM and SIGINT on to the trials meanwhile."""
        return self._children.listening()

    def prepare(self, trial: Trial) -> int:
        """Check the whole command and fill the cache that all trials read; the exit code of it."""
        return self._children.start(("train", *trial.words, "--dry-run")).wait()

    def run(self, trials: Sequence[Trial], *, parallel: int, ended: Callable[[Standing], None]) -> ExitCode:
        """Run the trials, at most ``parallel`` at a time, until all have ended or a notice came.

        Args:
            ended: told of each trial when its process has ended.

        Returns:
            0, or the first of these that occurred: 130 and 42 after a notice to the sweep or to a trial, 2 for a
            command that cannot work (no further trial is begun after these), 1 after a crash.
        """
        waiting, codes = list(trials), list[ExitCode]()
        while waiting or self._running:
            while waiting and len(self._running) < parallel and not self._is_over(codes):
                self._begin(waiting.pop(0))
            if not self._running:
                break
            time.sleep(POLL_SECONDS)
            for each in list(self._running):
                self._watch(each)
                if each.process.poll() is None:
                    continue
                self._running.remove(each)
                standing = self._end(each)
                codes.append(_code_of(standing, each.process.returncode))
                ended(standing)
                if codes[-1] in (ExitCode.STOPPED, ExitCode.PREEMPTED) and self.signal is None:
                    self._children.pass_on(signal.SIGINT if codes[-1] == ExitCode.STOPPED else signal.SIGTERM)
        if self._children.noticed is not None:
            return self._children.noticed
        return next((code for code in (ExitCode.CONFIGURATION, ExitCode.CRASHED) if code in codes), ExitCode.DONE)

    def _is_over(self, codes: Sequence[ExitCode]) -> bool:
        return self.signal is not None or ExitCode.CONFIGURATION in codes

    def _begin(self, trial: Trial) -> None:
        output = log_of(trial)
        output.parent.mkdir(parents=True, exist_ok=True)
        logger.info("%s: begins; its output is in %s", trial.name, output)
        with output.open("ab") as log:
            process = self._children.start(("train", *trial.words), log)
        self._running.append(_Running(trial, process, time.monotonic()))

    def _watch(self, each: _Running) -> None:
        """Look at the trial's newest records: is it diverging, how far is it."""
        if each.given_up is not None:
            if time.monotonic() - each.given_up > STOP_PATIENCE and each.process.poll() is None:
                each.process.kill()
            return
        size = each.metrics.stat().st_size if each.metrics.is_file() else 0
        if size == each.size:
            return
        each.size = size
        steps = parse_metrics(each.metrics.read_text(encoding="utf-8", errors="replace")).steps if size else ()
        found = divergence(steps, self._criteria)
        if found:
            give_up(each.trial, found)
            logger.info("%s: diverged at step %d: %s", each.trial.name, found.step, found.reason)
            each.given_up = time.monotonic()
            each.process.terminate()
        elif steps and time.monotonic() - each.told > TOLD_EVERY:
            each.told = time.monotonic()
            logger.info("%s: step %d, loss %.4f", each.trial.name, steps[-1]["step"], steps[-1]["loss"])

    def _end(self, each: _Running) -> Standing:
        """Look a last time, and say what became of the trial."""
        standing = standing_of(each.trial)
        logger.info("%s: %s at step %d", standing.name, standing.outcome, standing.step)
        if not standing.finished and self.signal is None:
            lines = log_of(each.trial).read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
            logger.warning(
                "%s ended with exit code %d:\n  %s", standing.name, each.process.returncode, "\n  ".join(lines)
            )
        return standing


def log_of(trial: Trial) -> Path:
    """The file on this machine that takes the trial's output, of all its lives."""
    return trial.config.run_dir.parent / f"{trial.name}.log"


@contextmanager
def sweep_lock(folder: Path) -> Iterator[int]:
    """Keeps other sweeps out of the folder, until this one and all its trials have ended.

    Raises:
        ConfigError: another one stays in there.
    """
    with lock_folder(folder, LOCK, "another sweep, or a trial of one,") as descriptor:
        yield descriptor


def _code_of(standing: Standing, code: int) -> ExitCode:
    """What a trial's end means for the sweep."""
    return ExitCode.DONE if standing.finished else exit_code_of(code)
