"""Conversations in OpenAI's chat format, as types.

Source: https://platform.openai.com/docs/api-reference/chat/create (messages, tools).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

Role = Literal["system", "developer", "user", "assistant", "tool"]

ROLES: tuple[Role, ...] = ("system", "developer", "user", "assistant", "tool")

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Where an assistant message may carry its reasoning apart from its content."""

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
    weight: NotRequired[Literal[0, 1]]
    """0 keeps the whole turn out of the loss, as in OpenAI's fine-tuning format."""
    no_loss: NotRequired[list[tuple[int, int]]]
    """Character ranges of ``content`` that are not targets: ascending, apart, not empty."""


class ToolMessage(TypedDict):
    role: Literal["tool"]
    tool_call_id: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """What one training sample says."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


def loss_runs(message: Message) -> list[tuple[str, bool]]:
    """An assistant message's content as (text, is a target) runs, in order; no run is empty, neighbours differ."""
    content = message.get("content", "")
    if message.get("weight", 1) == 0:
        return [(content, False)] if content else []
    runs = []
    done = 0
    for start, end in message.get("no_loss", ()):
        runs += [(content[done:start], True), (content[start:end], False)]
        done = end
    return [run for run in [*runs, (content[done:], True)] if run[0]]
