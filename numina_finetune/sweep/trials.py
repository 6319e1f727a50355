"""What a sweep runs: one training for each learning rate, the same in everything else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from numina_finetune.config import RunConfig
from numina_finetune.errors import ConfigError
from numina_finetune.storage import Store, open_store


@dataclass(frozen=True)
class Trial:
    """One training of the sweep."""

    rate: float
    config: RunConfig
    words: tuple[str, ...]
    """The options of ``numina-finetune`` that run it."""

    @property
    def name(self) -> str:
        return self.config.resolved_run_id

    @property
    def store(self) -> Store:
        return open_store(self.config.run_url)

    @property
    def settings(self) -> str:
        """The same for the same training, wherever it lies: what is known of one is not taken for another's."""
        return replace(self.config, run_id=None).resolved_run_id


def parse_rates(text: str) -> tuple[float, ...]:
    """Learning rates in rising order: ``1e-5,3e-5``, or ``1e-6:1e-4:5``, which is five of them evenly spaced in log.

    Raises:
        ConfigError: with every part that is neither.
    """
    rates, faults = set[float](), []
    for part in (part.strip() for part in text.split(",")):
        try:
            rates |= set(_part(part))
        except (ValueError, OverflowError):
            faults.append(
                f"--lrs {part!r} is no learning rate above 0: write numbers such as 1e-5,3e-5, or LOW:HIGH:COUNT "
                "with a count of 2 or more, such as 1e-6:1e-4:5"
            )
    if faults:
        raise ConfigError(faults)
    return tuple(sorted(rates))


def trials_of(base: RunConfig, words: Sequence[str], rates: Sequence[float]) -> list[Trial]:
    """One trial for each rate, in the sweep's folder, with the sweep's cache of tokenised data and its tracker group.

    Args:
        base: what ``words`` say without a learning rate.
        words: the options that were passed through.
    """
    shared: dict[str, Any] = {}
    if base.cache_dir is None:
        shared["cache_dir"] = f"{base.output_dir.rstrip('/')}/cache"
    if "wandb" in base.trackers and base.tracker_group is None:
        shared["tracker_group"] = f"sweep-{base.output_dir.rstrip('/').rsplit('/', 1)[-1]}"
    trials = []
    for rate in rates:
        own = {"learning_rate": rate, "run_id": f"lr-{rate!r}", **shared}
        options = [word for name, value in own.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        trials.append(Trial(rate, replace(base, **own), (*words, *options)))
    return trials


def _part(text: str) -> list[float]:
    if ":" not in text:
        rates = [float(text)]
    else:
        low, high, count = text.split(":")
        if not (0 < float(low) < float(high) < math.inf and int(count) >= 2):
            raise ValueError(text)
        # Three figures: rates that a person can read, and type again.
        rates = [float(f"{rate:.3g}") for rate in np.geomspace(float(low), float(high), int(count))]
    if not all(0 < rate < math.inf for rate in rates):
        raise ValueError(text)
    return rates
