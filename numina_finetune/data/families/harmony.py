"""gpt-oss's layout, Harmony: messages with channels, and a system message that names the date and the effort.

An assistant message becomes one message a channel: analysis, then the calls on commentary or the answer on final::

    <|start|>assistant | <|channel|>analysis<|message|>2+2 is 4.<|end|>
    <|start|>assistant to=functions.python<|channel|>commentary <|constrain|>json<|message|>{"code":"2+2"}<|call|> |
    <|start|>functions.python to=assistant<|channel|>commentary<|message|>4<|end|>
    <|start|>assistant | <|channel|>final<|message|>4<|return|> |

Between the bars is what the model writes, and so what is supervised. Two decisions are ours:

- The text that stands beside tool calls is reasoning, so it goes to analysis and is kept there; gpt-oss's own template
  drops it once an answer follows.
- History shows an answer ended by ``<|end|>`` where the model must write ``<|return|>``. That ``<|end|>`` is no target:
  it would teach the model not to stop.

Source: https://github.com/openai/harmony (docs/format.md and the behaviour of release 0.0.8).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby, islice, takewhile
from typing import Any

from numina_finetune.data.conversation import REASONING_KEYS, Conversation, Message, loss_runs
from numina_finetune.data.families.harmony_tools import functions_section
from numina_finetune.data.families.pieces import Piece, span_faults
from numina_finetune.errors import ConfigError, DataError

REASONING_EFFORTS = ("low", "medium", "high")

TOKENS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>", "<|return|>")
"""Each is one token of every tokenizer that this layout fits."""


@dataclass(frozen=True)
class Harmony:
    """The ``Family`` of gpt-oss.

    Attributes:
        date: today's date for the model, as ``2025-06-28``; pinned, for else tokens would change at midnight.
        reasoning_effort: low, medium or high.

    Raises:
        ConfigError: the reasoning effort is unknown.
    """

    date: str
    reasoning_effort: str = "medium"

    def __post_init__(self) -> None:
        if self.reasoning_effort not in REASONING_EFFORTS:
            raise ConfigError(
                f"reasoning effort {self.reasoning_effort!r} is unknown: use one of {', '.join(REASONING_EFFORTS)}"
            )

    @property
    def name(self) -> str:
        return "harmony"

    def pieces(self, conversation: Conversation) -> list[Piece]:
        """See ``Family``.

        Raises:
            DataError: an assistant message says nothing, a tool message answers no call, reasoning is no text, or a
                tool's definition cannot be written.
        """
        return self._pieces(conversation, last=len(conversation.messages) - 1)

    def prompt(self, conversation: Conversation) -> list[Piece]:
        """See ``Family``; raises as ``pieces``."""
        pieces = self._pieces(conversation, last=None)
        return [*(piece._replace(supervised=False) for piece in pieces), _layout("<|start|>assistant")]

    def spans(self, conversation: Conversation) -> list[str]:
        """What the runs of targets must say; read off the messages alone, so that it tells where ``pieces`` errs."""
        texts: list[str | None] = []
        for position, message in enumerate(conversation.messages):
            if message["role"] == "assistant" and message.get("weight", 1) != 0:
                texts += [*_targets(message, last=position == len(conversation.messages) - 1), None]
        runs = ["".join(text or "" for text in run) for _, run in groupby(texts, key=lambda text: text is None)]
        return [run for run in runs if run]

    def mask_faults(self, conversation: Conversation, pieces: list[Piece], decoded: list[str]) -> list[str]:
        return span_faults(self.spans(conversation), decoded)

    def _pieces(self, conversation: Conversation, last: int | None) -> list[Piece]:
        """All messages; an answer at position ``last`` ends the conversation, any other is history."""
        messages, tools = conversation.messages, conversation.tools or []
        if faults := _faults(messages):
            raise DataError(faults)
        pieces = [_layout(self._system(calls=bool(tools)))]
        instructed = bool(messages) and messages[0]["role"] in ("system", "developer")
        if tools and not instructed:
            pieces += _developer(None, tools)
        for position, message in enumerate(messages):
            role = message["role"]
            if role == "assistant":
                pieces += _turn(message, _answers(messages, position), last=position == last)
            elif role == "user":
                pieces += [_layout("<|start|>user<|message|>"), _data(message["content"]), _layout("<|end|>")]
            elif role != "tool":  # tool messages stand with the calls that they answer
                pieces += _developer(message["content"], tools if position == 0 else [])
        return pieces

    def _system(self, *, calls: bool) -> str:
        lines = [
            "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.",
            "Knowledge cutoff: 2024-06",
            f"Current date: {self.date}",
            "",
            f"Reasoning: {self.reasoning_effort}",
            "",
            "# Valid channels: analysis, commentary, final. Channel must be included for every message.",
        ]
        if calls:
            lines.append("Calls to these tools must go to the commentary channel: 'functions'.")
        return "\n".join(lines) + "<|end|>"


def _faults(messages: list[Message]) -> list[str]:
    faults: list[str] = []
    unanswered: set[str] = set()
    for position, message in enumerate(messages):
        if message["role"] == "tool":
            if (identifier := message["tool_call_id"]) not in unanswered:
                faults.append(
                    f"messages[{position}].tool_call_id: {identifier!r} answers no open call of the assistant message "
                    "before it; give it that call's id, or drop the message"
                )
            unanswered.discard(identifier)
            continue
        unanswered = set()
        if message["role"] == "assistant":
            unanswered = {call["id"] for call in message.get("tool_calls", ())}
            faults += _assistant_faults(message, f"messages[{position}]")
    return faults


def _assistant_faults(message: Message, place: str) -> list[str]:
    faults = [
        f"{place}.{key}: is {type(message[key]).__name__}, needs text"
        for key in REASONING_KEYS
        if not isinstance(message.get(key) or "", str)
    ]
    if not faults and not _reasoning(message) and not _says(message) and not message.get("tool_calls"):
        faults.append(f"{place}.content: is empty, so there is nothing to learn")
    return faults


def _developer(instructions: str | None, tools: list[dict[str, Any]]) -> list[Piece]:
    sections = [] if instructions is None else [f"# Instructions\n\n{instructions}"]
    if tools:
        sections.append(functions_section(tools))
    return [_layout("<|start|>developer<|message|>"), _data("\n\n".join(sections)), _layout("<|end|>")]


def _turn(message: Message, answers: Mapping[str, str], *, last: bool) -> list[Piece]:
    """An assistant message and the answers to its calls: the model stops at each call, and is answered at once."""
    learnt = message.get("weight", 1) != 0
    calls = message.get("tool_calls", ())
    messages: list[list[Piece]] = []
    if reasoning := _reasoning(message):
        messages.append(_said("analysis", [(reasoning, learnt)], _layout("<|end|>", learnt), learnt))
    if _says(message):
        ending = "<|return|>" if last and not calls else "<|end|>"
        end = _layout(ending, learnt and (last or bool(calls)))
        messages.append(_said(_channel(message), loss_runs(message), end, learnt))
    start = _layout("<|start|>assistant")
    pieces: list[Piece] = []
    for said in messages:
        pieces += [start, *said]
        start = _layout("<|start|>assistant", learnt)
    for call in calls:
        pieces += [start, *_call(call["function"], learnt)]
        if call["id"] in answers:
            pieces += _answer(call["function"]["name"], answers[call["id"]])
        start = _layout("<|start|>assistant")
    return pieces


def _said(channel: str, runs: list[tuple[str, bool]], end: Piece, learnt: bool) -> list[Piece]:
    return [_layout(f"<|channel|>{channel}<|message|>", learnt), *(_data(*run) for run in runs), end]


def _call(function: Mapping[str, str], learnt: bool) -> list[Piece]:
    return [
        _data(f" to=functions.{function['name']}", learnt),
        _layout("<|channel|>commentary <|constrain|>json<|message|>", learnt),
        _data(function["arguments"], learnt),
        _layout("<|call|>", learnt),
    ]


def _answer(name: str, content: str) -> list[Piece]:
    return [
        _layout("<|start|>"),
        _data(f"functions.{name}"),
        _layout(" to=assistant<|channel|>commentary<|message|>"),
        _data(content),
        _layout("<|end|>"),
    ]


def _answers(messages: list[Message], position: int) -> dict[str, str]:
    """The contents of the tool messages that follow an assistant message, by call id."""
    following = takewhile(lambda message: message["role"] == "tool", islice(messages, position + 1, None))
    return {message["tool_call_id"]: message["content"] for message in following}


def _targets(message: Message, *, last: bool) -> list[str | None]:
    """The texts that the model is to write in this turn, in order; None where something else stands between them."""
    opening = "<|start|>assistant"
    calls = message.get("tool_calls", ())
    texts: list[str | None] = []
    if reasoning := _reasoning(message):
        texts += [opening, f"<|channel|>analysis<|message|>{reasoning}<|end|>"]
    if _says(message):
        texts += [opening, f"<|channel|>{_channel(message)}<|message|>"]
        texts += [text if learnt else None for text, learnt in loss_runs(message)]
        texts.append("<|end|>" if calls else "<|return|>" if last else None)
    for number, call in enumerate(calls):
        function = call["function"]
        texts.append(None if number else opening)
        texts.append(f" to=functions.{function['name']}<|channel|>commentary <|constrain|>json<|message|>")
        texts.append(f"{function['arguments']}<|call|>")
    return texts[1:]  # the prompt ends in the first opening


def _channel(message: Message) -> str:
    if not message.get("tool_calls"):
        return "final"
    return "commentary" if _reasoning(message) else "analysis"


def _says(message: Message) -> bool:
    return bool(message.get("content", "").strip())


def _reasoning(message: Message) -> str:
    return next((message[key] for key in REASONING_KEYS if (message.get(key) or "").strip()), "")


def _layout(text: str, supervised: bool = False) -> Piece:
    return Piece(text, True, supervised)


def _data(text: str, supervised: bool = False) -> Piece:
    return Piece(text, False, supervised)
