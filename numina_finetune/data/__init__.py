"""Rows become conversations, conversations become masked tokens, tokens become packed batches.

Pure Python, NumPy, ``datasets`` and tokenizers: no model and no device is known here. The three public names load
their modules on first use, so that importing the package stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numina_finetune.data.chat import render
    from numina_finetune.data.formats import format_example
    from numina_finetune.data.tool_calls import validate_messages

__all__ = ["format_example", "render", "validate_messages"]

_HOMES = {"format_example": "formats", "render": "chat", "validate_messages": "tool_calls"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
