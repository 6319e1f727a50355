"""What the loop knows of an evaluator that it is handed: how to call it, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Accuracy:
    """How often the model answers problems right, with its 95% interval."""

    problems: int
    share: float
    lower: float
    upper: float

    @property
    def figures(self) -> dict[str, float]:
        """As ``metrics.jsonl`` names them."""
        return {
            "eval_accuracy": self.share,
            "eval_accuracy_lower": self.lower,
            "eval_accuracy_upper": self.upper,
            "eval_problems": self.problems,
        }

    def __str__(self) -> str:
        return f"accuracy {self.share:.1%} of {self.problems} (95% {self.lower:.1%} to {self.upper:.1%})"


MeasureAccuracy = Callable[[Callable[[], bool]], Accuracy | None]
"""Measures the model as the backend holds it; None where it is told on the way that it is to stop. Both
are the same on every process. Collective."""
