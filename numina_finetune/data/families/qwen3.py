"""Qwen3's chat layout, with the empty think block before every assistant turn.

The model's own template writes the block before the last turn only, so that earlier turns would be trained on prompts
that inference never shows: with thinking off, it is prefilled each time::

    <|im_start|>user\\n2+2?<|im_end|>\\n<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n | 4<|im_end|> | \\n
                                                                                  | targets     |

Source: the chat template that ships with Qwen/Qwen3-0.6B.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from numina_finetune.data.conversation import Conversation, Message, loss_runs
from numina_finetune.data.families.pieces import Piece, joined, refuse_reasoning, span_faults

NO_THINKING = "<think>\n\n</think>\n\n"
"""What the generation prompt ends with where thinking is off."""

TOKENS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
"""Each is one token of every tokenizer that this layout fits."""

_START = Piece("<|im_start|>", True, False)
_CLOSE = Piece("<|im_end|>\n", True, False)
_ASSISTANT = Piece(f"<|im_start|>assistant\n{NO_THINKING}", True, False)
_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_CALLING = (
    ("\n</tools>\n\nFor each function call, return a json object with function name and arguments within ", False),
    ("<tool_call></tool_call>", True),
    (" XML tags:\n", False),
    ("<tool_call>", True),
    ('\n{"name": <function-name>, "arguments": <args-json-object>}\n', False),
    ("</tool_call>", True),
)
"""(text, is layout) of what follows the signatures."""


@dataclass(frozen=True)
class Qwen3:
    """A :class:`~numina_finetune.data.families.pieces.Family`."""

    name: str = "qwen3"

    def pieces(self, conversation: Conversation) -> list[Piece]:
        messages = conversation.messages
        pieces = _system(conversation)
        for position, message in enumerate(messages):
            role = message["role"]
            if role == "assistant":
                pieces += [_ASSISTANT, *_turn(message), Piece("\n", True, False)]
            elif role == "tool":
                first = messages[position - 1]["role"] != "tool"
                last = position + 1 == len(messages) or messages[position + 1]["role"] != "tool"
                pieces += _tool_result(message["content"], first, last)
            elif role == "user" or position > 0:  # the opening system message is written by _system
                name = "system" if role == "developer" else role
                pieces += [_START, Piece(f"{name}\n{message['content']}", False, False), _CLOSE]
        refuse_reasoning(conversation)
        return pieces

    def prompt(self, conversation: Conversation) -> list[Piece]:
        return [*(piece._replace(supervised=False) for piece in self.pieces(conversation)), _ASSISTANT]

    def mask_faults(self, conversation: Conversation, pieces: list[Piece], decoded: list[str]) -> list[str]:
        turns = (_turn(message) for message in conversation.messages if message["role"] == "assistant")
        return span_faults([span for turn in turns for span in joined(turn)], decoded)


def _system(conversation: Conversation) -> list[Piece]:
    """The opening system turn with the tools' signatures; nothing where there is neither."""
    first = conversation.messages[0]
    content = first["content"] if first["role"] in ("system", "developer") else ""
    opens = first["role"] in ("system", "developer")
    if not conversation.tools:
        return [_START, Piece(f"system\n{content}", False, False), _CLOSE] if opens else []
    signatures = "".join("\n" + _json(tool) for tool in conversation.tools)
    opening, *calling = _CALLING
    text = f"system\n{content}\n\n{_TOOLS}" if opens else f"system\n{_TOOLS}"
    return [
        _START,
        Piece(f"{text}{signatures}{opening[0]}", False, False),
        *(Piece(text, layout, False) for text, layout in calling),
        _CLOSE,
    ]


def _turn(message: Message) -> list[Piece]:
    """What the model is to write in this turn, end token included."""
    learned = message.get("weight", 1) != 0
    pieces = [Piece(text, False, supervised) for text, supervised in _content_runs(message)]
    for call in message.get("tool_calls", ()):
        name, arguments = call["function"]["name"], _json(json.loads(call["function"]["arguments"]))
        if pieces:
            pieces.append(Piece("\n", False, learned))
        pieces += [
            Piece("<tool_call>", True, learned),
            Piece(f'\n{{"name": "{name}", "arguments": {arguments}}}\n', False, learned),
            Piece("</tool_call>", True, learned),
        ]
    return [*_merged(pieces), Piece("<|im_end|>", True, learned)]


def _content_runs(message: Message) -> list[tuple[str, bool]]:
    """The prompt ends in newlines; the template drops those that the content begins with."""
    runs = loss_runs(message)
    while runs:
        text = runs[0][0].lstrip("\n")
        if text:
            return [(text, runs[0][1]), *runs[1:]]
        runs.pop(0)
    return runs


def _merged(pieces: list[Piece]) -> list[Piece]:
    """Neighbouring data pieces of one kind joined: one text, one tokenisation."""
    merged: list[Piece] = []
    for piece in pieces:
        if merged and merged[-1][1:] == piece[1:] and not piece.layout:
            piece = piece._replace(text=merged.pop().text + piece.text)
        merged.append(piece)
    return merged


def _tool_result(content: str, first: bool, last: bool) -> list[Piece]:
    """Results of neighbouring tool messages share one user turn."""
    return [
        Piece("<|im_start|>user\n<tool_response>" if first else "\n<tool_response>", True, False),
        Piece(f"\n{content}\n", False, False),
        Piece("</tool_response><|im_end|>\n" if last else "</tool_response>", True, False),
    ]


def _json(value: Any) -> str:
    """As ``tojson`` writes it in chat templates."""
    return json.dumps(value, ensure_ascii=False)
