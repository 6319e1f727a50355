"""Numbers that layers count while they are traced, such as dropped tokens, on their way to the step's metrics.

A module deep in the model can return nothing besides its result. What it counts goes to the innermost
:func:`counting`; a loop hands its turns' sum on, so that values of a loop's body never leave it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_open: list[torch.Tensor] | None = None


def count(value: torch.Tensor) -> None:
    """Add a tensor on the device to what is being counted, if anything is; all must have one shape."""
    if _open is not None:
        _open.append(value)


@contextmanager
def counting() -> Iterator[list[torch.Tensor]]:
    """Collects what is counted within; nothing of it reaches what was being counted before."""
    global _open
    before, _open = _open, []
    try:
        yield _open
    finally:
        _open = before
