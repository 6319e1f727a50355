"""What a TPU type is: its chips, how they are wired, what they can do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from numina_finetune.errors import ConfigError
from numina_finetune.spot.shapes import shape_of

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One generation of chips.

    Rates are the vendor's peaks (cloud.google.com/tpu/docs: the pages on v4, v5e, v5p and v6e; link rates as in
    jax-ml.github.io/scaling-book/tpus). The clock is what makes the compiler's cycles of a large matrix product agree
    with the peak rate. ``hbm_bytes`` is the limit that libtpu 0.0.21 names when a program does not fit.
    """

    name: str
    """As Google's documents name it."""
    compiler_name: str
    """Prefix of the compiler's topologies, such as ``v5e`` of ``v5e:2x4``."""
    hbm_bytes: int
    """What a program may hold."""
    bf16_flops: float
    """A second."""
    hbm_bandwidth: float
    """Bytes a second."""
    link_bandwidth: float
    """Bytes a second over one link in one direction."""
    torus_dimensions: int
    clock_hz: float
    pci_id: str
    """Of the device that a chip is on a machine's PCI bus, as JAX knows it (``jax/_src/hardware_utils.py``)."""


CHIPS = {
    "v4": Chip("v4", "v4", int(30.75 * GIB), 275e12, 1.228e12, 45e9, 3, 1.05e9, "0x005e"),
    "v5litepod": Chip("v5e", "v5e", int(15.75 * GIB), 197e12, 0.819e12, 45e9, 2, 1.5e9, "0x0063"),
    "v5p": Chip("v5p", "v5p", int(95.74 * GIB), 459e12, 2.765e12, 90e9, 3, 1.75e9, "0x0062"),
    "v6e": Chip("v6e", "v6e", int(31.25 * GIB), 918e12, 1.64e12, 90e9, 2, 1.75e9, "0x006f"),
}
"""By the first part of a type's name."""

_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
"""Topologies of the generations wired as a plane, by chips (the vendor's tables)."""
_MOST_CHIPS = 4096 * 2
_ALIASES = {"v5e": "v5litepod"}


@dataclass(frozen=True)
class Slice:
    """One slice of a type such as ``v5litepod-16``."""

    accelerator: str
    chip: Chip
    chips: int
    hosts: int
    grid: tuple[int, ...]
    """Chips along each dimension of the wiring."""

    @property
    def topology(self) -> str:
        """The compiler's name of the slice, such as ``v5e:4x4``."""
        return f"{self.chip.compiler_name}:{'x'.join(map(str, self.grid))}"

    @property
    def family(self) -> str:
        return self.accelerator.partition("-")[0]

    def topology_options(self, slices: int) -> dict[str, object]:
        """What the compiler must be told besides the topology's name, to see ``slices`` of them."""
        options: dict[str, object] = {}
        if self.chip.name == "v4":
            options["chip_config_name"] = "megacore"  # a chip's two cores as one device, as on the machine
        if math.prod(self.grid) == 1:
            options["chips_per_host_bounds"] = [1, 1, 1]
        if slices > 1:
            options["num_slices"] = slices
        return options

    @property
    def interconnect(self) -> float:
        """Bytes a second into a chip over all its links, at best: one link along a side of two, none along one."""
        return self.chip.link_bandwidth * sum(min(side - 1, 2) for side in self.grid)


_PCI = Path("/sys/bus/pci/devices")
_GOOGLE = "0x1ae0"
"""The vendor's number on a PCI bus; its network cards have it too."""


def pci_chips(bus: Path = _PCI) -> list[Chip]:
    """The chips that are attached to this machine and are in the table, one entry each."""
    by_id = {chip.pci_id: chip for chip in CHIPS.values()}
    devices = [path.parent for path in sorted(bus.glob("*/vendor")) if path.read_text("ascii").strip() == _GOOGLE]
    ids = [(device / "device").read_text("ascii").strip() for device in devices]
    return [by_id[number] for number in ids if number in by_id]


def this_machines_chip(accelerator: str | None = None, bus: Path = _PCI) -> Chip | None:
    """The kind of chip here, told without the network; None where it cannot be told, or is not in the table.

    Args:
        accelerator: a type's name, such as ``v5litepod-16``, where the environment has one; else the PCI bus is asked.
    """
    if accelerator:
        family = accelerator.partition("-")[0]
        return CHIPS.get(_ALIASES.get(family, family))
    return next(iter(pci_chips(bus)), None)


def parse_tpu(accelerator: str) -> Slice:
    """The slice that a type names.

    Raises:
        ConfigError: there is no such type.
    """
    family, dash, count = accelerator.partition("-")
    shape = shape_of(_ALIASES.get(family, family) + dash + count)
    chip = CHIPS[shape.family]
    grid = _grid(chip, shape.chips)
    if grid is None:
        raise ConfigError(
            f"--tpu {accelerator!r}: there is no {shape.family} slice of {shape.chips} chips: the nearest have "
            f"{' and '.join(map(str, _nearest(chip, shape.chips)))}"
        )
    return Slice(shape.accelerator, chip, shape.chips, shape.hosts, grid)


def _grid(chip: Chip, chips: int) -> tuple[int, ...] | None:
    """Chips along each dimension, or None where there is no slice of so many."""
    if chip.torus_dimensions == 2:
        return tuple(map(int, _FLAT[chips].split("x"))) if chips in _FLAT else None
    # A cube's faces are 2x2 hosts; each side is 1, 2, or a multiple of 4 (2 only in slices below a 4x4x4 cube).
    if chips in (4, 8, 16, 32):
        return {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}[chips]
    if chips % 64:
        return None
    cubes = chips // 64
    best = min(
        (
            (a, b, cubes // (a * b))
            for a in range(1, math.isqrt(cubes) + 1)
            if cubes % a == 0
            for b in range(a, cubes + 1)
            if cubes // a % b == 0 and cubes // (a * b) >= b
        ),
        key=sum,
        default=None,
    )
    return tuple(4 * side for side in best) if best else None


def _nearest(chip: Chip, chips: int) -> list[int]:
    """Sizes that exist, the next one below and above."""
    sizes = [size for size in range(1, _MOST_CHIPS + 1) if _grid(chip, size)]
    below, above = [size for size in sizes if size < chips], [size for size in sizes if size > chips]
    return [*below[-1:], *above[:1]]
