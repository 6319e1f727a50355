"""How long an attempt takes from its process's start to its first optimizer step, and on what."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

FIRST_STEP = "to_first_step"
_NAMES = {
    "start": "imports and checks",
    "data": "data",
    "model": "model and state",
    "step": "the step, traced and compiled",
}


@dataclass
class StartUp:
    """The parts of it, one after the other."""

    seconds: dict[str, float] = field(default_factory=dict)
    """By part; with `FIRST_STEP`, all of them, once there was a step."""
    _began: float = field(default_factory=lambda: time.monotonic() - _process_age())

    def part(self, name: str) -> None:
        """A part ends, and the next one begins."""
        self.seconds[name] = time.monotonic() - self._began - sum(self.seconds.values())

    def first_step(self, compiling: float) -> str | None:
        """The first optimizer step has been handed to the devices: a line for a person; None from the second on.

        Args:
            compiling: seconds that the device library took for programs, of all parts.
        """
        if FIRST_STEP in self.seconds:
            return None
        self.part("step")
        parts = ", ".join(f"{_NAMES[name]} {seconds:.1f} s" for name, seconds in self.seconds.items())
        self.seconds |= {"compile": compiling, FIRST_STEP: sum(self.seconds.values())}
        compiled = f"; compiling took {compiling:.1f} s of it" if compiling else ""
        return f"first step {self.seconds[FIRST_STEP]:.1f} s after the start: {parts}{compiled}"


def _process_age() -> float:
    """Seconds since the process began; 0 where the system does not say."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # since the machine started
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - began, 0.0)
    except (OSError, AttributeError, IndexError, ValueError):
        return 0.0
