"""The pieces that a conversation is written in, and what a chat layout has to say about them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from numina_finetune.data.conversation import Conversation


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

    def spans(self, conversation: Conversation) -> list[str]:
        """What the runs of neighbouring supervised tokens must decode to, in order: the check of the loss mask."""
        ...
