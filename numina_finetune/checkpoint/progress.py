"""Where a run stands: small, and enough to find the next batch without any earlier one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Progress:
    """Counts over the whole run, all lives together."""

    step: int = 0
    """Finished optimizer steps."""
    rows: int = 0
    """Rows of the deterministic row sequence that they used up."""
    tokens: int = 0
    """Real (not padding) tokens among them, as of the last time metrics were read."""

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.rows, self.tokens = int(state["step"]), int(state["rows"]), int(state["tokens"])
