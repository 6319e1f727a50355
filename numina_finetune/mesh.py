"""``--mesh "fsdp=4,tensor=2"`` as data, checked against the number of devices."""

from __future__ import annotations

import math
from dataclasses import dataclass

from numina_finetune.config import BATCH_AXES, MESH_AXES, SHARD_AXES
from numina_finetune.errors import ConfigError


@dataclass(frozen=True)
class MeshShape:
    """How many devices lie along each axis, in the order in which they vary (the last one fastest)."""

    dcn: int = 1
    """Slices, joined by the data-centre network."""
    data: int = 1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in MESH_AXES)

    @property
    def by_axis(self) -> dict[str, int]:
        return dict(zip(MESH_AXES, self.sizes, strict=True))

    @property
    def devices(self) -> int:
        return math.prod(self.sizes)

    @property
    def data_parallel_size(self) -> int:
        """Replicas that take different rows of a batch."""
        return math.prod(getattr(self, axis) for axis in BATCH_AXES)

    @property
    def shards(self) -> int:
        """Parts of a weight whose rows lie over all the axes that split weights."""
        return math.prod(getattr(self, axis) for axis in SHARD_AXES)

    def __str__(self) -> str:
        named = [f"{axis}={size}" for axis, size in zip(MESH_AXES, self.sizes, strict=True) if size > 1]
        return ",".join(named) or "one device"


def parse_mesh(text: str | None, devices: int, *, default_axis: str = "fsdp") -> MeshShape:
    """The mesh that ``text`` names; all devices along ``default_axis`` where it is None.

    Raises:
        ConfigError: unknown axes, sizes that are no numbers, or a product that is not ``devices``; all at once.
    """
    if not text:
        return MeshShape(**{default_axis: devices})
    sizes: dict[str, int] = {}
    faults = []
    for part in text.split(","):
        axis, _, size = (piece.strip() for piece in part.partition("="))
        if axis not in MESH_AXES:
            faults.append(f"--mesh {text!r}: axis {axis!r} is unknown: use {', '.join(MESH_AXES)}")
        elif axis in sizes:
            faults.append(f"--mesh {text!r}: axis {axis} is given twice: keep one")
        elif not _is_size(size):
            faults.append(
                f"--mesh {text!r}: {axis}={size or '(nothing)'} is not a size: use 1 or more, or -1 for the rest"
            )
        else:
            sizes[axis] = int(size)
    if not faults:
        faults = _fill(text, sizes, devices)
    if faults:
        raise ConfigError(faults)
    return MeshShape(**sizes)


def _is_size(text: str) -> bool:
    return text == "-1" or (text.isdecimal() and int(text) > 0)


def _fill(text: str, sizes: dict[str, int], devices: int) -> list[str]:
    """Replace a single -1 by what is left of ``devices``; return what does not work out."""
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        return [f"--mesh {text!r}: -1 stands on {' and '.join(open_axes)}: only one axis can take the rest"]
    known = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and devices % known == 0:
        sizes[open_axes[0]] = devices // known
        return []
    if open_axes or known != devices:
        return [
            f"--mesh {text!r} multiplies to {known}, but there are {devices} devices: "
            f"make the axes multiply to {devices}, such as fsdp={devices}"
        ]
    return []
