"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    NOTE = "note"
    """Worth knowing; a run may go well all the same."""
    FAULT = "fault"
    """A run would fail, or not be what was asked for."""


@dataclass(frozen=True)
class Finding:
    """One fact about this machine."""

    level: Level
    subject: str
    text: str
    fix: str = ""
    """What to do about it; empty where all is well."""

    def line(self) -> str:
        """As a person reads it."""
        return f"{self.level:<5} {self.subject}: {self.text}" + (f"\n      fix: {self.fix}" if self.fix else "")


def ok(subject: str, text: str) -> Finding:
    return Finding(Level.OK, subject, text)


def note(subject: str, text: str, fix: str = "") -> Finding:
    return Finding(Level.NOTE, subject, text, fix)


def fault(subject: str, text: str, fix: str) -> Finding:
    return Finding(Level.FAULT, subject, text, fix)
