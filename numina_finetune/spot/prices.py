"""What a chip costs an hour, as far as it is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from numina_finetune.errors import ConfigError
from numina_finetune.spot.shapes import region_of, shape_of

SOURCE = (
    "spot list prices of SkyPilot's public catalogue (catalogs/v8/gcp/vms.csv, commit 006059e0f18a), copied in "
    "November 2026 and divided by chips; Google changes spot prices, up to once in 30 days: check "
    "cloud.google.com/spot-vms/pricing, and give your own with --prices"
)

SPOT: Mapping[str, Mapping[str, float]] = {
    "v4": {"us-central2": 0.9215},
    "v5litepod": {
        "asia-east1": 0.55579,
        "asia-northeast1": 0.4244,
        "asia-southeast1": 0.78,
        "europe-west1": 0.52853,
        "europe-west4": 0.44498,
        "us-central1": 0.24493,
        "us-east1": 0.24493,
        "us-east4": 0.6,
        "us-east5": 0.6,
        "us-south1": 0.5664,
        "us-west1": 0.24493,
        "us-west4": 0.48,
    },
    "v5p": {
        "europe-west1": 1.78378,
        "europe-west4": 1.34849,
        "us-central1": 0.8357,
        "us-east1": 0.8357,
        "us-east5": 1.68,
        "us-south1": 1.31614,
    },
    "v6e": {
        "asia-northeast1": 0.94352,
        "asia-south1": 2.27,
        "asia-southeast1": 0.36292,
        "europe-west4": 1.03748,
        "us-central1": 0.54421,
        "us-east1": 0.54421,
        "us-east4": 0.57766,
        "us-east5": 1.215,
        "us-south1": 1.35,
        "us-west1": 0.54421,
    },
}
"""Dollars for a chip and an hour, by family and region; the source is `SOURCE`."""


@dataclass(frozen=True)
class Prices:
    """Prices by family and region.

    Attributes:
        source: where they come from, and when.
    """

    table: Mapping[str, Mapping[str, float]]
    source: str

    def of(self, accelerator: str, zone: str) -> float | None:
        """Dollars for a chip and an hour; None where it is not known."""
        return self.table.get(shape_of(accelerator).family, {}).get(region_of(zone))


def load_prices(path: Path | None) -> Prices:
    """The built-in table, or that of a YAML file.

    Raises:
        ConfigError: the file cannot be used.
    """
    if path is None:
        return Prices(SPOT, SOURCE)
    try:
        return parse_prices(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ConfigError(f"--prices {path} cannot be read: {error.strerror}") from error


def parse_prices(text: str, where: str) -> Prices:
    """A table as YAML: ``date``, and ``prices`` as family -> region -> dollars.

    Raises:
        ConfigError: it is none.
    """
    try:
        content = yaml.safe_load(text)
        table = {
            str(family): {str(region): float(price) for region, price in regions.items()}
            for family, regions in content["prices"].items()
        }
        return Prices(table, f"{where}, {content['date']}")
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"--prices {where}: needs `date: 2026-11-01` and `prices: {{v6e: {{us-east5: 1.2}}}}` ({error})"
        ) from error
