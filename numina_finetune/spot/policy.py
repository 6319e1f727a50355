"""What the user decided about one supervised run, resolved."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from numina_finetune.spot.budgets import Budgets

_NAME_CHARACTERS = 36


@dataclass(frozen=True)
class Target:
    """One way to get a machine."""

    accelerator: str
    zone: str


@dataclass(frozen=True)
class Policy:
    """Times in seconds.

    Attributes:
        prefix: of the names of all machines of the run.
        targets: in the order in which they are tried.
        queue_seconds: in the queue before the next target is tried; a single target is waited for.
        grace_seconds: after workers have ended, for the machine's state to show why.
        stall_seconds: without a heartbeat or a step.
        stop_seconds: for the training to save and end.
        max_hours: of machine time.
        max_cost: in dollars.
    """

    prefix: str
    targets: Sequence[Target]
    slices: int = 1
    budgets: Budgets = field(default_factory=Budgets)
    poll_seconds: float = 30.0
    queue_seconds: float = 3600.0
    ready_seconds: float = 1800.0
    setup_seconds: float = 1800.0
    grace_seconds: float = 90.0
    stall_seconds: float = 1800.0
    stop_seconds: float = 900.0
    backoff_seconds: float = 60.0
    max_backoff_seconds: float = 1800.0
    max_hours: float | None = None
    max_cost: float | None = None


def machine_prefix(run_url: str) -> str:
    """The beginning of the names of a run's machines; of no other run's, whatever they are called.

    Args:
        run_url: the run's place, such as ``gs://bucket/runs/my-run``.
    """
    run_url = run_url.rstrip("/")
    digest = hashlib.sha256(run_url.encode()).hexdigest()[:8]
    slug = re.sub(r"[^a-z0-9]+", "-", run_url.rsplit("/", 1)[-1].lower()).strip("-")[:_NAME_CHARACTERS].rstrip("-")
    return f"nf-{slug}-{digest}" if slug else f"nf-{digest}"
