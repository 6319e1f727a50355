"""What a run's steps tell together: which of them stand out, and how noisy their gradients are."""

from __future__ import annotations

from typing import Any

from numina_finetune.train import noise, spikes
from numina_finetune.train.metrics import Metrics, Record
from numina_finetune.train.noise import NoiseScale
from numina_finetune.train.spikes import Spike, SpikeWatch

_NAMED = 10
"""Steps that stood out, by number in the last line."""


PREVIEW = "numina-finetune data preview, with the run's data options and"
"""What prints rows of a run."""


def skipped_line(record: Record) -> str | None:
    """A line on a step that was skipped; None for any other."""
    if record.get("applied", True):
        return None
    first, last = record["rows"]
    return (
        f"warning: step {record['step']} was skipped: loss {record['loss']:.4g}, gradient norm "
        f"{record['grad_norm']:.4g}; it took rows {first} to {last} ({PREVIEW} --run-rows {first}-{last})"
    )


class Curves:
    """Follows the records of the steps in their order. A later life begins with those of the earlier ones, and so
    finds what a life that was never stopped would have found."""

    def __init__(self, rows_per_step: int, spike_factor: float) -> None:
        """
        Args:
            spike_factor: see :class:`numina_finetune.train.spikes.SpikeWatch`.
        """
        self._rows_per_step = rows_per_step
        self._watch, self._noise = SpikeWatch(spike_factor), NoiseScale()
        self._spikes: list[int] = []
        self._skipped: list[int] = []

    def resume(self, metrics: Metrics) -> None:
        """Take in what earlier lives left on record."""
        counted = [record for record in metrics.steps if record.get("applied", True)]
        for record in counted[-max(noise.WINDOW, spikes.WINDOW) :]:
            self._look(record)
        self._spikes = [int(record["step"]) for record in metrics.spikes]
        self._skipped = [int(record["step"]) for record in metrics.steps if not record.get("applied", True)]

    def take(self, record: Record, first_row: int) -> tuple[Record, Record | None]:
        """The record with the noise scale, if there is one, or the rows of a step that was skipped; and a record of its
        own if the step stands out.

        Args:
            first_row: of those that the step took.
        """
        rows = [first_row, first_row + self._rows_per_step - 1]
        if not record.get("applied", True):
            self._skipped.append(record["step"])
            return record | {"rows": rows}, None
        spike = self._look(record)
        batches = self._noise.batches if "gradient_noise" in record else None
        if batches is not None:
            record = record | {"noise_scale_rows": round(batches * self._rows_per_step, 2)}
        if spike is None:
            return record, None
        self._spikes.append(record["step"])
        found: dict[str, Any] = {
            "loss": spike.loss,
            "usual_loss": spike.usual_loss,
            "grad_norm": spike.grad_norm,
            "usual_grad_norm": spike.usual_grad_norm,
            "above": list(spike.above),
            "rows": rows,
        }
        return record, {"step": record["step"], "spike": found, "life": record["life"]}

    def told(self, record: Record) -> str | None:
        """A line on a step that stands out; None for one right after another, whose line is enough."""
        step, found = record["step"], record["spike"]
        if step - 1 in self._spikes:
            return None
        first, last = found["rows"]
        return (
            f"warning: step {step} stands out: loss {found['loss']:.4f} (usual: {found['usual_loss']:.4f}), gradient "
            f"norm {found['grad_norm']:.4g} (usual: {found['usual_grad_norm']:.4g}); it took rows {first} to {last} "
            f"({PREVIEW} --run-rows {first}-{last})"
        )

    @property
    def summary(self) -> str | None:
        """The last lines on the steps of all lives that stood out or were skipped; None if there are none."""
        kinds = (
            (self._spikes, "that stood out by their loss or gradient norm", "what was usual then, and their rows"),
            (self._skipped, "skipped as not finite", "their rows"),
        )
        lines = []
        for steps, what, more in kinds:
            named = ", ".join(map(str, steps[:_NAMED])) + (", …" if len(steps) > _NAMED else "")
            lines += [f"steps {what}: {len(steps)} ({named}); metrics.jsonl has {more}"] if steps else []
        return "\n".join(lines) or None

    def _look(self, record: Record) -> Spike | None:
        if not record.get("applied", True):
            return None
        if "gradient_noise" in record:
            self._noise.add(record["gradient_signal"], record["gradient_noise"])
        return self._watch.look(record["loss"], record["grad_norm"])
