"""The one place that knows every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numina_finetune.config import RunConfig


def factory(name: str) -> Callable[[RunConfig], Any]:
    """What makes the backend of that name; each imports its device library only when chosen."""
    if name == "xla":
        from numina_finetune.xla.backend import XlaBackend

        return XlaBackend
    from numina_finetune.torch_native.backend import NativeBackend

    return NativeBackend
