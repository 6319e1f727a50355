"""How long a whole training would take at least, and what it would cost."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace

from numina_finetune.config import RunConfig
from numina_finetune.plan.roofline import Bound
from numina_finetune.spot.prices import Prices
from numina_finetune.tpu import Slice
from numina_finetune.train.batch import plan_steps

_PATIENCE = 5.0
"""Seconds that the hub has for its answer."""


@dataclass(frozen=True)
class Training:
    """A whole run at the bound's speed: no step is faster, so neither hours nor dollars can be less."""

    rows: int
    steps: int
    hours: float
    chips: int
    region: str | None
    dollars_per_chip_hour: float | None
    dollars: float | None
    price_source: str

    def lines(self) -> Iterator[str]:
        yield (
            f"the dataset: {self.rows:,} rows, {self.steps:,} steps: at least {self.hours:.2f} h on {self.chips} chips"
        )
        if self.dollars is None:
            yield "  its price is not known: give one with --prices"
        else:
            yield (
                f"  at least ${self.dollars:.2f} at ${self.dollars_per_chip_hour:.4f} a chip and hour in {self.region} "
                f"({self.price_source})"
            )


def training_of(
    config: RunConfig,
    rows: int,
    global_batch: int,
    bound: Bound,
    tpu: Slice,
    chips: int,
    prices: Prices,
    region: str | None,
) -> Training:
    """The run over ``rows`` rows of the dataset.

    Args:
        region: None = the cheapest of those whose price is known.
    """
    steps = plan_steps(config, rows, global_batch)
    hours = steps * bound.seconds / 3600
    table = prices.table.get(tpu.family, {})
    chosen = region or min(table, key=lambda name: table[name], default=None)
    each = table[chosen] if chosen else None
    dollars = each * chips * hours if each is not None else None
    return Training(rows, steps, hours, chips, chosen, each, dollars, prices.source)


def region_faults(tpu: Slice, prices: Prices, region: str | None) -> list[str]:
    """What is wrong with ``--region``."""
    table = prices.table.get(tpu.family, {})
    if region is None or region in table:
        return []
    return [
        f"--region {region}: no price of {tpu.family} is known there: use {', '.join(sorted(table)) or 'none'}, "
        "or give prices with --prices"
    ]


def hub_answers() -> bool:
    """Whether the hub can be reached at all, asked once."""
    request = urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_PATIENCE).close()
    except urllib.error.HTTPError:  # an answer as well
        return True
    except (OSError, ValueError):
        return False
    return True


def dataset_rows(config: RunConfig) -> int:
    """Rows that the run takes from its datasets; tokenises them, or finds them in the cache.

    Raises:
        UserError: the datasets cannot be trained on.
        OSError, ValueError: they cannot be read here and now.
    """
    from numina_finetune.models.tokenizer import load_tokenizer
    from numina_finetune.train.preparation import load_data

    data = load_data(replace(config, eval_dataset_name=None), load_tokenizer(config))
    return int(data.train.rows_for_epochs(config.num_train_epochs))
