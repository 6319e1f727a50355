"""Any chat template: its text, cut where each generation prompt and each assistant turn ends.

Control tokens are found in the template's text; names of control tokens in the data are hidden from it before it is
rendered, and put back as plain text afterwards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from numina_finetune.data.conversation import Conversation, Message, loss_runs
from numina_finetune.data.families.pieces import Piece, joined, refuse_reasoning, shortened, span_faults
from numina_finetune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HIDDEN = range(0xF0000, 0xFFFFE)
"""A plane of private-use characters: they stand for control tokens' names while the template is rendered."""


@dataclass(frozen=True)
class Template:
    """A :class:`~numina_finetune.data.families.pieces.Family`."""

    tokenizer: PreTrainedTokenizerBase
    date: str
    """What the template writes for today's date, YYYY-MM-DD: with the real one, tokens would change at midnight."""
    name: str = "template"

    def pieces(self, conversation: Conversation) -> list[Piece]:
        """As the protocol says.

        Raises:
            DataError: the template renders a conversation and its beginnings differently (so that training would see
                prompts that inference never shows), writes no end token, or leaves out what a turn says.
        """
        refuse_reasoning(conversation)
        hidden, shown = self._hide(conversation)
        full = self._text(hidden, len(hidden.messages))
        pieces: list[Piece] = []
        done = 0
        for position, message in enumerate(hidden.messages):
            if message["role"] != "assistant":
                continue
            prompt = self._text(hidden, position, prompt=True)
            through = self._text(hidden, position + 1)
            turn = self._through_end_token(through[len(prompt) :]) if through.startswith(prompt) else None
            if turn is None or not full.startswith(prompt + turn):
                raise DataError(
                    f"messages[{position}]: the chat template renders this turn differently once more follows (it is "
                    "not prefix-stable), so its loss mask cannot be derived"
                )
            self._refuse_other_text(message, turn, position)
            pieces += self._cut(full[done : len(prompt)], False, shown)
            for text, supervised in _runs(message, turn, position):
                pieces += self._cut(text, supervised, shown)
            done = len(prompt) + len(turn)
        return [*pieces, *self._cut(full[done:], False, shown)]

    def prompt(self, conversation: Conversation) -> list[Piece]:
        hidden, shown = self._hide(conversation)
        return list(self._cut(self._text(hidden, len(hidden.messages), prompt=True), False, shown))

    def mask_faults(self, conversation: Conversation, pieces: list[Piece], decoded: list[str]) -> list[str]:
        return span_faults(joined(pieces), decoded)  # that these say the messages was checked on the text

    # --- text ---------------------------------------------------------------------------------------------------------

    def _text(self, conversation: Conversation, count: int, prompt: bool = False) -> str:
        """The template's own text of the first ``count`` messages."""
        tokenizer = self.tokenizer
        if not tokenizer.chat_template:
            raise DataError("the tokenizer has no chat template, and no family of ours fits it")
        try:
            text = tokenizer.apply_chat_template(
                [_for_template(message) for message in conversation.messages[:count]],
                tools=list(conversation.tools or ()) or None,
                tokenize=False,
                add_generation_prompt=prompt,
                chat_template=self._dated(tokenizer.get_chat_template(tools=conversation.tools)),
                enable_thinking=False,
            )
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise DataError(f"the chat template refuses the conversation: {error}") from error
        return str(text)

    def _dated(self, template: str) -> str:
        """The template with its calls of ``strftime_now("%Y-%m-%d")`` replaced by the pinned date."""
        call = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
        return call.sub(lambda match: f'"{date.fromisoformat(self.date).strftime(match[2])}"', template)

    def _through_end_token(self, text: str) -> str:
        """``text`` up to its last control token, after which only white space may stand."""
        ends = [match.end() for match in self._control.finditer(text)]
        if not ends or text[ends[-1] :].strip():
            raise DataError("the chat template ends an assistant turn without an end token")
        return text[: ends[-1]]

    def _refuse_other_text(self, message: Message, turn: str, position: int) -> None:
        """Templates may trim the content; how they write tool calls is their own, but nothing may be missing in them.

        Raises:
            DataError: the turn leaves something out, or, without calls, says more than the message.
        """
        body, content = self._control.sub("", turn).strip(), message.get("content", "").strip()
        functions = [call["function"] for call in message.get("tool_calls", ())]
        keys = [key for function in functions for key in json.loads(function["arguments"])]
        words = [content, *(function["name"] for function in functions), *keys]
        if not (all(word in body for word in words) if functions else body == content):
            raise DataError(
                f"messages[{position}]: the chat template writes {shortened(turn)!r}, which is not this "
                f"turn, {shortened(message.get('content', ''))!r}, and its end token"
            )

    # --- control tokens -----------------------------------------------------------------------------------------------

    @cached_property
    def _tokens(self) -> tuple[str, ...]:
        """The names of the control tokens, longer ones first."""
        return tuple(sorted((str(token) for token in self.tokenizer.get_added_vocab()), key=len, reverse=True))

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Matches any control token; nothing where there are none."""
        return re.compile("|".join(map(re.escape, self._tokens)) or r"(?!)")

    def _hide(self, conversation: Conversation) -> tuple[Conversation, Callable[[str], str]]:
        """The conversation with a private-use character for each control token's name in its data, and the way back."""
        if not any(self._control.search(text) for text in _texts(conversation)):
            return conversation, lambda text: text
        if any(message.get("no_loss") for message in conversation.messages):
            raise DataError("messages: hold control tokens' names beside text that is kept out of the loss")
        if any(ord(character) in _HIDDEN for text in _texts(conversation) for character in text):
            raise DataError(
                "messages: hold control tokens' names and private-use characters, which cannot both be kept"
            )
        messages, tools = (_replaced(part, self._hidden) for part in (conversation.messages, conversation.tools))
        return Conversation(messages, tools), self._shown

    def _hidden(self, text: str) -> str:
        return self._control.sub(lambda match: chr(_HIDDEN[self._tokens.index(match[0])]), text)

    def _shown(self, text: str) -> str:
        return re.sub(
            f"[{chr(_HIDDEN[0])}-{chr(_HIDDEN[-1])}]",
            lambda match: (
                self._tokens[place] if (place := ord(match[0]) - _HIDDEN[0]) < len(self._tokens) else match[0]
            ),
            text,
        )

    def _cut(self, text: str, supervised: bool, shown: Callable[[str], str]) -> Iterator[Piece]:
        """Control tokens and the data between them, hidden names put back by ``shown``."""
        done = 0
        for match in self._control.finditer(text):
            if done < match.start():
                yield Piece(shown(text[done : match.start()]), False, supervised)
            yield Piece(match[0], True, supervised)
            done = match.end()
        if done < len(text):
            yield Piece(shown(text[done:]), False, supervised)


def _runs(message: Message, turn: str, position: int) -> list[tuple[str, bool]]:
    """The turn cut into (text, is a target) runs, where the message asks for it."""
    if message.get("weight", 1) == 0:
        return [(turn, False)]
    if not message.get("no_loss"):
        return [(turn, True)]
    start = turn.find(message["content"])
    if start < 0:
        raise DataError(f"messages[{position}]: the chat template changes the content, so no part of it can be masked")
    runs = loss_runs(message)
    end = start + len(message["content"])
    return [run for run in [(turn[:start], True), *runs, (turn[end:], True)] if run[0]]


def _for_template(message: Message) -> Message:
    """The message as templates expect it: arguments as objects (some encode text twice), content never missing."""
    message = {**message, "content": message.get("content", "")}
    if message["role"] == "developer":  # templates drop a role that they do not know without a word
        message["role"] = "system"
    if "tool_calls" in message:
        message["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]
    return message


def _texts(value: Any) -> Iterator[str]:
    """Every text in a conversation, or in a part of it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Conversation):
        yield from _texts(value.messages)
        yield from _texts(value.tools)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _replaced(value: Any, replace: Any) -> Any:
    """A copy of nested data with each of its texts replaced."""
    if isinstance(value, str):
        return replace(value)
    if isinstance(value, dict):
        return {replace(key): _replaced(item, replace) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(item, replace) for item in value]
    return value
