"""The pieces that a conversation is written in, and what a chat layout has to say about them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple, Protocol

from numina_finetune.data.conversation import REASONING_KEYS, Conversation
from numina_finetune.errors import DataError


class Piece(NamedTuple):
    """Text that is tokenised alone.

    Layout is the model's own: the names of control tokens in it are control tokens. Anything else is data, in which
    such names are plain text: a row can never end its own turn.
    """

    text: str
    layout: bool
    supervised: bool
    """Whether its tokens are targets."""


class Family(Protocol):
    """A chat layout."""

    @property
    def name(self) -> str: ...

    def pieces(self, conversation: Conversation) -> list[Piece]:
        """The whole conversation; each assistant turn is a target, its end token included.

        Raises:
            DataError: the layout has no place for something in the conversation.
        """
        ...

    def prompt(self, conversation: Conversation) -> list[Piece]:
        """The conversation up to where the model begins to write the next assistant turn; no piece is a target.

        Raises:
            DataError: as for ``pieces``.
        """
        ...

    def mask_faults(self, conversation: Conversation, pieces: list[Piece], decoded: list[str]) -> list[str]:
        """What is wrong with the loss mask; empty if nothing.

        Args:
            pieces: what ``pieces`` gave for the conversation.
            decoded: the text of each run of neighbouring supervised tokens.
        """
        ...


def joined(pieces: Iterable[Piece]) -> list[str]:
    """The text of each run of neighbouring supervised pieces."""
    return [
        "".join(piece.text for piece in run)
        for supervised, run in groupby(pieces, key=lambda piece: piece.supervised)
        if supervised
    ]


def span_faults(expected: list[str], decoded: list[str]) -> list[str]:
    """The places where decoded targets differ from what they must say, after the normalisation that tokenizers do."""
    if len(decoded) != len(expected):
        return [f"the loss mask has {len(decoded)} runs of targets, needs {len(expected)}"]
    return [
        f"the supervised tokens of run {number} decode to {shortened(said)!r}, not to {shortened(wanted)!r}"
        for number, (wanted, said) in enumerate(zip(expected, decoded, strict=True))
        if not same_text(wanted, said)
    ]


def same_text(left: str, right: str) -> bool:
    """Equal, or equal after the normalisation that tokenizers do (Qwen's to NFC)."""
    return left == right or _normal(left) == _normal(right)


def refuse_reasoning(conversation: Conversation) -> None:
    """For layouts whose prompts turn thinking off: reasoning would be trained where inference never shows it.

    Raises:
        DataError: a message has reasoning apart from its content, or think tags in it.
    """
    for position, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        if any(message.get(key) for key in REASONING_KEYS):
            raise DataError(f"messages[{position}]: has separate reasoning, which is not trained on: put it in content")
        content = message.get("content", "")
        if "<think>" in content or "</think>" in content:
            raise DataError(f"messages[{position}].content: holds <think> tags, but thinking is off in every prompt")


def shortened(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:60]} … {text[-50:]}"


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text)
