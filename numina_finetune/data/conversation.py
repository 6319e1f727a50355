"""Conversations in OpenAI's chat format, as types.

Source: https://platform.openai.com/docs/api-reference/chat/create (messages, tools).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

Role = Literal["system", "developer", "user", "assistant", "tool"]

ROLES: tuple[Role, ...] = ("system", "developer", "user", "assistant", "tool")

Message = dict[str, Any]
"""A message that passed ``validate_messages``: one of the TypedDicts below, possibly with further keys."""


class SystemMessage(TypedDict):
    role: Literal["system", "developer"]
    content: str


class UserMessage(TypedDict):
    role: Literal["user"]
    content: str


class FunctionCall(TypedDict):
    name: str
    arguments: str
    """A JSON object, as text."""


class ToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(TypedDict):
    role: Literal["assistant"]
    content: NotRequired[str]
    """Required unless there are tool calls."""
    tool_calls: NotRequired[list[ToolCall]]


class ToolMessage(TypedDict):
    role: Literal["tool"]
    tool_call_id: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """What one training sample says."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
