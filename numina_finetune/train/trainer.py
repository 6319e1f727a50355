"""The training loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

from numina_finetune.checkpoint.manager import CheckpointManager
from numina_finetune.checkpoint.preemption import StopNotice
from numina_finetune.checkpoint.progress import Progress
from numina_finetune.config import RunConfig
from numina_finetune.data.loader import Batch, Loader
from numina_finetune.errors import TrainingDiverged
from numina_finetune.train.accuracy import MeasureAccuracy
from numina_finetune.train.backend import Backend, DeviceMetrics
from numina_finetune.train.batch import BatchPlan
from numina_finetune.train.optim import learning_rate_at
from numina_finetune.train.profiling import ProfiledSteps
from numina_finetune.train.report import Report
from numina_finetune.train.speed import Seconds

logger = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 10
"""Non-finite steps after which more of them will not help."""


@dataclass(frozen=True)
class Plan:
    """What this life of the run has to do."""

    batch: BatchPlan
    total_steps: int
    total_rows: int | None
    """Rows from this one on are empty; None where ``--max-steps`` sets the end."""


class Trainer:
    """One life of a run, from its newest checkpoint to its end or to a notice."""

    def __init__(
        self,
        config: RunConfig,
        backend: Backend,
        plan: Plan,
        train_rows: Loader,
        eval_rows: Loader | None,
        *,
        progress: Progress,
        checkpoints: CheckpointManager,
        report: Report,
        notice: StopNotice,
        measure: MeasureAccuracy | None = None,
    ) -> None:
        self._config, self._backend, self._plan = config, backend, plan
        self._train_rows, self._eval_rows, self._measure = train_rows, eval_rows, measure
        self._progress, self._checkpoints, self._report, self._notice = progress, checkpoints, report, notice
        self._saved_step, self._saved_at = progress.step, time.monotonic()
        self._pending: list[tuple[DeviceMetrics, float]] = []
        self._skipped_in_a_row = 0
        self._spent = Seconds()
        self._profile = ProfiledSteps(config, backend)

    def run(self) -> bool:
        """Train until the last step (True) or until any process is asked to stop (False); saved either way."""
        # A life that ended between its last save and the evaluation leaves it to the next one.
        if self._evaluation_due() and not self._evaluate():
            return self._stop()
        while self._progress.step < self._plan.total_steps:
            if self._backend.processes.any(self._notice.wanted):
                return self._stop()
            self._train_step()
            if self._progress.step % self._config.logging_steps == 0:
                self._log()
            if self._save_due():
                self._save()
            if self._evaluation_due() and not self._evaluate():
                return self._stop()
        self._profile.close()
        self._checkpoints.finish()
        self._report_saves()
        return True

    def _stop(self) -> bool:
        """Save, as any process was asked to stop."""
        self._notice.follow(self._backend.processes.gather(self._notice.told))
        self._profile.close()
        self._save(wait=True)
        return False

    def _save_due(self) -> bool:
        step, config = self._progress.step, self._config
        if step == self._plan.total_steps or (config.save_steps and step % config.save_steps == 0):
            return True
        if not config.save_minutes:
            return False
        return self._backend.processes.any(time.monotonic() - self._saved_at >= 60 * config.save_minutes)

    def _evaluation_due(self) -> bool:
        step, every = self._progress.step, self._config.eval_steps
        return step > 0 and (step == self._plan.total_steps or (every > 0 and step % every == 0))

    def _train_step(self) -> None:
        learning_rate = learning_rate_at(self._progress.step, self._plan.total_steps, self._config)
        self._profile.before(self._progress.step + 1)
        begun = time.monotonic()
        batches = [self._backend.put_batch(rows) for rows in self._micro_batches()]
        sent = time.monotonic()
        self._pending.append((self._backend.step(batches, learning_rate), learning_rate))
        self._spent.input += sent - begun
        self._spent.dispatch += time.monotonic() - sent
        self._progress.step += 1
        self._profile.after(self._progress.step)
        self._progress.rows += self._plan.batch.global_batch
        self._report.advance()

    def _micro_batches(self) -> Iterator[Batch]:
        """This process's part of each micro-batch of the next optimizer step."""
        plan = self._plan.batch
        for micro_batch in range(plan.accumulation):
            first = self._progress.rows + micro_batch * plan.rows_per_micro_batch
            yield self._share(self._train_rows, first, plan.rows_per_micro_batch, self._plan.total_rows)

    def _share(self, rows: Loader, first: int, count: int, end: int | None) -> Batch:
        own = count * self._backend.replicas_per_process // self._backend.data_parallel_size
        return rows.batch(first + own * self._backend.process_index, own, end)

    def _log(self) -> None:
        """Read the metrics since the last time: the one place where the loop waits for the device."""
        if not self._pending:
            return
        begun = time.monotonic()
        metrics = self._backend.read([device for device, _ in self._pending])
        self._spent.wait += time.monotonic() - begun
        self._progress.tokens += sum(metric.tokens for metric in metrics)
        rates = [rate for _, rate in self._pending]
        self._report.log(metrics, rates, self._spent, rows=self._progress.rows)
        self._spent = Seconds()
        self._pending.clear()
        for metric in metrics:
            self._skipped_in_a_row = 0 if metric.applied else self._skipped_in_a_row + 1
            if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise TrainingDiverged(
                    f"{MAX_SKIPPED_IN_A_ROW} optimizer steps in a row had a non-finite loss or gradient and were "
                    f"skipped; the last checkpoint is of step {self._checkpoints.committed_step or 0}: lower "
                    "--learning-rate or look at the data there"
                )

    def _save(self, *, wait: bool = False) -> None:
        self._log()
        if self._saved_step == self._progress.step:
            if wait:
                self._checkpoints.finish()
        elif self._checkpoints.save(self._progress.step, wait=wait):
            self._saved_step, self._saved_at = self._progress.step, time.monotonic()
        self._report_saves()
        self._report.pause_clock()

    def _report_saves(self) -> None:
        for saved in self._checkpoints.drain():
            self._report.log_checkpoint(saved)

    def _evaluate(self) -> bool:
        """The loss and the accuracy, as far as there is something to measure; False if told to stop on the way."""
        if self._eval_rows is None and self._measure is None:
            return True
        self._log()
        figures: dict[str, float] = {}
        said: list[str] = []
        loss, accuracy = None, None
        if self._eval_rows is not None:
            loss, tokens = self._evaluation_loss(self._eval_rows)
            figures |= {"eval_loss": loss, "eval_tokens": tokens}
            said.append(f"evaluation loss {loss:.4f} over {tokens} tokens")
        if self._measure is not None:
            accuracy = self._measure(lambda: self._backend.processes.any(self._notice.wanted))
            if accuracy is None:
                return False
            figures |= accuracy.figures
            said.append(f"{accuracy}")
        self._report.log_evaluation(self._progress.step, figures, "  ".join(said))
        self._checkpoints.note_evaluation(self._progress.step, loss, accuracy.share if accuracy else None)
        return True

    def _evaluation_loss(self, evaluated: Loader) -> tuple[float, int]:
        """Mean loss over the whole evaluation set, in rows of the training shape, and its supervised tokens."""
        rows, total = self._plan.batch.rows_per_micro_batch, evaluated.rows_per_epoch
        shares = (self._share(evaluated, first, rows, total) for first in range(0, total, rows))
        loss, tokens = self._backend.evaluate(self._backend.put_batch(share) for share in shares)
        return loss / max(tokens, 1), tokens
