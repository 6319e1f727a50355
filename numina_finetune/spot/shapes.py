"""What an accelerator type is: chips, hosts, and the image it boots; and which zone lies in which region."""

from __future__ import annotations

import re
from dataclasses import dataclass

from numina_finetune.errors import ConfigError


@dataclass(frozen=True)
class Family:
    """A TPU generation as its types are named.

    Sources: the TPU documentation's pages on v4, v5e, v5p and v6e.
    """

    image: str
    cores_counted: int
    """Cores of a chip where the type's number counts cores, else 1."""
    chips_of_whole_host: int
    """A type of at most so many chips is one host."""
    chips_a_host: int
    """In larger types."""


FAMILIES = {
    "v4": Family("tpu-ubuntu2204-base", 2, 4, 4),
    "v5litepod": Family("v2-alpha-tpuv5-lite", 1, 8, 4),
    "v5p": Family("v2-alpha-tpuv5", 2, 4, 4),
    "v6e": Family("v2-alpha-tpuv6e", 1, 8, 4),
}
_TYPE = re.compile(r"(?P<family>[a-z0-9]+)-(?P<count>[1-9][0-9]*)")
_ZONE = re.compile(r"(?P<region>[a-z]+-[a-z]+[0-9]+)-[a-z]")
DUAL_REGIONS = {
    "ASIA1": ("asia-northeast1", "asia-northeast2"),
    "EUR4": ("europe-north1", "europe-west4"),
    "EUR5": ("europe-west1", "europe-west2"),
    "EUR7": ("europe-west2", "europe-west3"),
    "EUR8": ("europe-west3", "europe-west6"),
    "NAM4": ("us-central1", "us-east1"),
}
"""Predefined dual-regions of Cloud Storage."""
_MULTI_REGIONS = {"US": "us-", "EU": "europe-", "ASIA": "asia-"}


@dataclass(frozen=True)
class Shape:
    """One slice."""

    accelerator: str
    family: str
    chips: int
    hosts: int
    image: str


def shape_of(accelerator: str) -> Shape:
    """The shape of one slice of a type such as ``v5litepod-16``.

    Raises:
        ConfigError: no type that is known here.
    """
    found = _TYPE.fullmatch(accelerator)
    family = FAMILIES.get(found["family"]) if found else None
    if found is None or family is None:
        raise ConfigError(
            f"--tpu {accelerator!r} is no TPU type: use {', '.join(f'{name}-N' for name in FAMILIES)}, such as v6e-8"
        )
    count = int(found["count"])
    chips, odd = divmod(count, family.cores_counted)
    hosts, rest = divmod(chips, family.chips_a_host)
    if odd or (chips > family.chips_of_whole_host and rest):
        raise ConfigError(f"--tpu {accelerator!r}: there is no {found['family']} slice of {count}")
    return Shape(accelerator, found["family"], chips, 1 if chips <= family.chips_of_whole_host else hosts, family.image)


def region_of(zone: str) -> str:
    """The region of a zone.

    Raises:
        ConfigError: no zone's name.
    """
    found = _ZONE.fullmatch(zone)
    if not found:
        raise ConfigError(f"--zones {zone!r} is no zone: write it as us-east5-b")
    return found["region"]


def same_place(zone: str, location: str) -> bool:
    """Whether a zone's machines use a bucket in ``location`` without leaving its region or regions."""
    location, region = location.upper(), region_of(zone)
    if location in _MULTI_REGIONS:
        return region.startswith(_MULTI_REGIONS[location])
    return region in DUAL_REGIONS.get(location, (location.lower(),))
