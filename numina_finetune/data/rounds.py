"""Rounds of one tool call and its answer, which a text with results in it becomes; and the text again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numina_finetune.data.conversation import Message
from numina_finetune.errors import DataError

_to_json = json.JSONEncoder(ensure_ascii=False).encode


def call_round(number: int, prose: str | None, tool: str, arguments: Mapping[str, Any], result: str) -> list[Message]:
    """An assistant message with one call, its id ``call_{number}``, and the tool message that answers it."""
    identifier = f"call_{number}"
    turn: Message = {"role": "assistant"}
    if prose is not None:
        turn["content"] = prose
    function = {"name": tool, "arguments": _to_json(arguments)}
    turn["tool_calls"] = [{"id": identifier, "type": "function", "function": function}]
    return [turn, {"role": "tool", "tool_call_id": identifier, "content": result}]


def rebuilt(messages: Sequence[Message], tool: str, text_of: Callable[[str | None, dict[str, Any], str], str]) -> str:
    """The text that rounds of ``tool`` and a final answer were made of.

    Args:
        text_of: the text of one round: of its prose (None where there is none), its arguments and its result.

    Raises:
        DataError: the messages are not such rounds.
    """
    try:
        *rounds, final = messages
        parts = []
        for turn, answer in zip(rounds[::2], rounds[1::2], strict=True):
            (call,) = turn["tool_calls"]
            arguments = json.loads(call["function"]["arguments"])
            parts.append(text_of(turn.get("content"), arguments, answer["content"]))
        return "".join([*parts, final["content"]])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"the {len(messages)} messages are no rounds of one {tool} call and its answer, with a final answer after "
            f"them ({error!r}): only what to_messages made can be converted back"
        ) from error
