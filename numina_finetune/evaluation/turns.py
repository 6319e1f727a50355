"""What a model wrote, read back as a message: the inverse of the chat layouts in ``data/families``.

Control tokens are told apart from text that looks like them by their ids, as the layouts do when they write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from numina_finetune.data.conversation import Message
from numina_finetune.data.normalise import decode_json, is_encodable
from numina_finetune.data.tir import PYTHON
from numina_finetune.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Call:
    """A tool call, well formed or not."""

    name: str
    arguments: str
    """JSON text as the layout can write it again."""
    fault: str | None = None
    """Why it cannot be read."""


@dataclass(frozen=True)
class Turn:
    """One generated turn."""

    content: str | None
    """None where the model wrote no text beside its calls."""
    reasoning: str | None
    calls: tuple[Call, ...]
    ended: bool
    """Whether the model ended it; false where it was cut."""

    def message(self, first_call: int) -> Message:
        """As OpenAI's chat format has it; calls get the ids ``call_{first_call}``, …"""
        message: Message = {"role": "assistant"}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.content is not None:
            message["content"] = self.content
        if self.calls:
            message["tool_calls"] = [
                {
                    "id": f"call_{number}",
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for number, call in enumerate(self.calls, first_call)
            ]
        return message


class _Part(NamedTuple):
    """A control token, or the text between two."""

    text: str
    control: bool
    end: bool = False
    """Whether it ends a message."""


class TurnReader:
    """Reads the turns of one tokenizer and chat family.

    Args:
        family: ``qwen3``, ``harmony`` or ``template``, as ``data.chat.resolve_family`` gives it.
        tools: whether tool calls will have to be read.

    Raises:
        ConfigError: the tokenizer's template writes tool calls in a form that is not known here.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, family: str, *, tools: bool) -> None:
        if tools and family == "template" and "<tool_call>" not in str(tokenizer.chat_template):
            raise ConfigError(
                "chat family template: this model's template does not write tool calls as <tool_call> JSON, so its "
                "calls cannot be read: evaluate without tools, or with --tir-style text"
            )
        self._tokenizer = tokenizer
        self._family = family
        self._controls = {int(number): str(token) for number, token in tokenizer.added_tokens_decoder.items()}
        self._has_tags = "<tool_call>" in self._controls.values()
        self._ends = _ENDS | {str(tokenizer.eos_token)}

    def read(self, tokens: Sequence[int]) -> Turn:
        """The turn that these tokens are, from the prompt's end on, its end token included."""
        parts = self._parts(tokens)
        return _harmony_turn(parts) if self._family == "harmony" else _qwen_turn(parts)

    def text(self, tokens: Sequence[int]) -> tuple[str, bool, str | None]:
        """A turn in which no calls are looked for, or the rest of one: text, whether it was ended, and reasoning."""
        if any(self._controls.get(token) == "<|message|>" for token in tokens):
            turn = self.read(tokens)
            return turn.content or "", turn.ended, turn.reasoning
        for position, token in enumerate(tokens):
            if self._controls.get(token) in self._ends:
                return self._decoded(tokens[:position]), True, None
        return self._decoded(tokens), False, None

    def _parts(self, tokens: Sequence[int]) -> list[_Part]:
        parts: list[_Part] = []
        run: list[int] = []
        for token in [*tokens, None]:
            if token is not None and token not in self._controls:
                run.append(token)
                continue
            if run:
                text = self._decoded(run)
                parts += [_Part(text, False)] if self._has_tags else _tagged(text)
                run = []
            if token is not None:
                control = self._controls[token]
                parts.append(_Part(control, True, control in self._ends))
        return parts

    def _decoded(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))


_ENDS = frozenset({"<|im_end|>", "<|endoftext|>", "<|return|>", "<|call|>", "<|end|>", "<|eot_id|>", "<|end_of_text|>"})
_RECIPIENT = re.compile(r"\bto=(\S+)")


def _tagged(text: str) -> list[_Part]:
    """Text in which the tags of tool calls are no tokens of their own."""
    pieces = re.split(r"(</?tool_call>)", text)
    return [_Part(piece, number % 2 == 1) for number, piece in enumerate(pieces) if piece]


# --- Qwen3, and templates that write calls as it does -------------------------------------------------------------


def _qwen_turn(parts: Sequence[_Part]) -> Turn:
    """``text \\n <tool_call> \\n {"name": …, "arguments": {…}} \\n </tool_call> <|im_end|>``."""
    said: list[str] = []
    calls: list[Call] = []
    inside: list[str] | None = None
    ended = False
    for text, control, end in parts:
        if end:
            ended = True
            break
        if control and text == "<tool_call>":
            inside = []
        elif control and text == "</tool_call>" and inside is not None:
            calls.append(_json_call("".join(inside)))
            inside = None
        elif inside is not None:
            inside.append(text)
        elif not calls:
            said.append(text)
    if inside is not None and ended:
        calls.append(_json_call("".join(inside), "the call is never closed by </tool_call>"))
    content = "".join(said)
    if calls:
        content = content.removesuffix("\n")
    return Turn(content if content or not calls else None, None, tuple(calls), ended)


def _json_call(text: str, fault: str | None = None) -> Call:
    """A call from its JSON; what the layout could not write again is shown to the model as an argument ``raw``."""
    raw = json.dumps({"raw": text}, ensure_ascii=False)
    try:
        value = decode_json(text)
    except ValueError as error:
        return Call(PYTHON, raw, fault or f"the call is no JSON ({error})")
    if not is_encodable(value):
        return Call(PYTHON, raw, "the call holds a lone surrogate, which is no text")
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return Call(PYTHON, raw, "the call is no JSON object with a name and arguments")
    arguments = value.get("arguments", {})
    if not isinstance(arguments, dict):
        return Call(value["name"], raw, "the arguments are no JSON object")
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False), fault)


# --- Harmony ------------------------------------------------------------------------------------------------------


def _harmony_turn(parts: Sequence[_Part]) -> Turn:
    """``<|channel|> analysis <|message|> text <|end|> <|start|> assistant … <|call|>`` or ``<|return|>``."""
    texts: dict[str, str] = {}
    calls: list[Call] = []
    header: list[str] = []
    body: list[str] | None = None
    ended = False
    for text, control, end in [*parts, _Part("", True, True)]:  # what is cut off ends in nothing
        if body is not None and end:
            words = " ".join(header)
            if recipient := _RECIPIENT.search(words):
                calls.append(_harmony_call(recipient[1], "".join(body), text))
            else:
                channel = next((name for name in ("analysis", "commentary") if name in words.split()), "final")
                texts[channel] = texts.get(channel, "") + "".join(body)
            header, body = [], None
            ended = text in ("<|call|>", "<|return|>")
        elif control and text == "<|message|>":
            body = []
        elif body is not None:
            body.append(text)
        elif end:
            ended = bool(text)
        else:
            header.append(text)
        if ended:
            break
    return _harmony_message(texts, tuple(calls), ended)


def _harmony_call(recipient: str, text: str, end: str) -> Call:
    name = recipient.removeprefix("functions.")
    if not end:
        return Call(name, text, "the call is cut off")
    try:
        return Call(name, text, None if isinstance(decode_json(text), dict) else "the arguments are no JSON object")
    except ValueError as error:
        return Call(name, text, f"the arguments are no JSON ({error})")


def _harmony_message(texts: dict[str, str], calls: tuple[Call, ...], ended: bool) -> Turn:
    """Beside calls, the layout writes content on analysis, or on commentary where there is reasoning."""
    if not calls:
        return Turn(texts.get("final", texts.get("commentary", "")), texts.get("analysis"), calls, ended)
    spoken = texts.get("commentary", texts.get("final"))
    if spoken is None:
        return Turn(texts.get("analysis"), None, calls, ended)
    return Turn(spoken, texts.get("analysis"), calls, ended)


def code_of(call: Call) -> tuple[str | None, str]:
    """The Python code of a call, or None and what the tool answers to a call that it cannot run."""
    if call.fault:
        return None, f"Error: {call.fault}."
    if call.name != PYTHON:
        return None, f"Error: there is no tool {call.name!r}; the only one is {PYTHON}."
    arguments: dict[str, Any] = json.loads(call.arguments)
    code = arguments.get("code")
    if not isinstance(code, str):
        return None, "Error: the argument code is missing or no text."
    return code, ""
