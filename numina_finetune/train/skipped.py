"""Optimizer steps that the device left out, and the end of a run whose steps or weights are no longer finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from numina_finetune.errors import TrainingDiverged
from numina_finetune.train.backend import StepMetrics

MAX_IN_A_ROW = 10
"""Skipped steps after which more of them will not help."""
_NAMED = 5
"""Parameters by name in a message."""


class SkippedSteps:
    """The streak of skipped steps that the run is in, if it is in one.

    A skipped step changes no weight and no moment: within a streak the state is that after the step before it.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        """Of each step of the streak."""

    @property
    def streak(self) -> int:
        """Steps in a row, up to now, that were skipped."""
        return len(self.tokens)

    def take(
        self, step: int, metric: StepMetrics, nonfinite: Callable[[], Sequence[str]], saved: Callable[[], int]
    ) -> None:
        """The next step.

        Args:
            nonfinite: names the parameters that are not finite. Collective.
            saved: step of the newest checkpoint, one on its way included; 0 where there is none. Collective.

        Raises:
            TrainingDiverged: its update made weights that are not finite, or the streak is too long.
        """
        # The norm of finite weights may still overflow.
        if not math.isfinite(metric.weight_norm) and (names := nonfinite()):
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            raise TrainingDiverged(
                f"the weights after step {step} are not finite: {', '.join(names[:_NAMED])}{more}; {_what_now(saved())}"
            )
        self.tokens = [] if metric.applied else [*self.tokens, metric.tokens]
        if self.streak >= MAX_IN_A_ROW:
            raise TrainingDiverged(
                f"the {self.streak} steps {step - self.streak + 1} to {step} were skipped, one after the other, since "
                f"their loss or gradients are not finite; {_what_now(saved())}"
            )

    def give_up(self, step: int, saved: int) -> TrainingDiverged:
        """What a run ends with whose last steps were skipped, and whose loss is not finite on other rows either."""
        return TrainingDiverged(
            f"the run's last {self.streak} steps, up to {step}, were skipped, since their loss or gradients are not "
            f"finite, and so is the loss of the rows before them; {_what_now(saved)}"
        )


def _what_now(saved: int) -> str:
    if not saved:
        return "there is no checkpoint: look at the data, or begin anew with a lower --learning-rate"
    return (
        f"nothing of that is saved, the newest checkpoint is of step {saved}: look at the data of the steps after it, "
        "or begin another run (--run-id) from that checkpoint's folder (--resume-from-checkpoint) with a lower "
        "--learning-rate"
    )
