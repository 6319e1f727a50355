"""Conversation -> token ids and loss mask; the mask is derived, then verified.

A chat layout (``families/``) cuts a conversation into pieces, prompt and answer in turn, and each piece is tokenised
alone, so that training sees the very tokens of inference: the prompt's ids, then a continuation::

    <|im_start|>user\\n2+2?<|im_end|>\\n<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n | 4<|im_end|> | \\n
    0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 | 1 1 1     | 0

The mask is then checked against the conversation: the supervised tokens, decoded, must be each assistant turn's text
and its end token, and nothing else; and no control token may come from the data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from numina_finetune.data.conversation import REASONING_KEYS, Conversation, Message
from numina_finetune.data.encoding import Encoder
from numina_finetune.data.families.harmony import TOKENS as HARMONY_TOKENS
from numina_finetune.data.families.harmony import Harmony
from numina_finetune.data.families.pieces import Family, Piece
from numina_finetune.data.families.qwen3 import TOKENS as QWEN3_TOKENS
from numina_finetune.data.families.qwen3 import Qwen3
from numina_finetune.data.families.template import Template
from numina_finetune.data.tool_calls import validate_conversation, without_none
from numina_finetune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FAMILIES = ("auto", "qwen3", "harmony", "template")


@dataclass(frozen=True)
class ChatOptions:
    """What, besides the conversation and the tokenizer, decides the tokens."""

    family: str = "auto"
    """One of ``FAMILIES``."""
    date: str = "2025-06-28"
    """What system messages give for today's date, YYYY-MM-DD: with the real one, tokens would change at midnight."""
    reasoning_effort: str = "medium"
    """What gpt-oss's system message asks for: low, medium or high."""


@dataclass(frozen=True)
class Rendered:
    """One training sample."""

    input_ids: list[int]
    loss_mask: list[bool]
    """True where the token is a target; as long as ``input_ids``."""


class Chunk(NamedTuple):
    """Many training samples, one after the other."""

    input_ids: NDArray[np.int32]
    """[tokens]."""
    loss_mask: NDArray[np.bool_]
    """[tokens]."""
    turn_ends: NDArray[np.bool_]
    """[tokens], True for the last token of each assistant turn that is a target."""
    offsets: NDArray[np.int64]
    """[conversations + 1], where each begins; a refused one is empty."""
    errors: dict[int, DataError]
    """Why a conversation was refused, by its number."""


class Renderer:
    """One tokenizer and one chat layout; made once for many conversations.

    Raises:
        ConfigError: an option is unknown, or the tokenizer does not fit the family.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: ChatOptions) -> None:
        self._encoder = Encoder(tokenizer)
        self.family = _family(resolve_family(tokenizer, options.family), tokenizer, options)

    def chunk(self, conversations: Sequence[Conversation]) -> Chunk:
        """The conversations as tokens with verified loss masks."""
        plans = [self._pieces(conversation) for conversation in conversations]
        pieces = [piece for plan in plans if not isinstance(plan, DataError) for piece in plan]
        encoded = self._encoder.encode(pieces)
        counts = np.array([len(ids) for ids in encoded], dtype=np.int64)
        tokens = list(chain.from_iterable(encoded))
        supervised = np.repeat(np.array([piece.supervised for piece in pieces], dtype=np.bool_), counts)
        layout = np.repeat(np.array([piece.layout for piece in pieces], dtype=np.bool_), counts)
        pieces_of = [0 if isinstance(plan, DataError) else len(plan) for plan in plans]
        chunk = Chunk(
            input_ids=np.array(tokens, dtype=np.int32),
            loss_mask=supervised,
            turn_ends=_turn_ends(supervised, layout),
            offsets=_ends(counts)[_ends(pieces_of)],
            errors={number: plan for number, plan in enumerate(plans) if isinstance(plan, DataError)},
        )
        self._verify(chunk, tokens, layout, conversations, plans)
        return _without_refused(chunk)

    def prompt(self, conversation: Conversation) -> list[int]:
        """The ids after which the model writes the next assistant turn."""
        return [token for ids in self._encoder.encode(self.family.prompt(conversation)) for token in ids]

    def _pieces(self, conversation: Conversation) -> list[Piece] | DataError:
        try:
            _refuse_silence(conversation)
            return [piece for piece in self.family.pieces(conversation) if piece.text]
        except DataError as error:
            return error

    def _verify(
        self,
        chunk: Chunk,
        tokens: list[int],
        layout: NDArray[np.bool_],
        conversations: Sequence[Conversation],
        plans: Sequence[list[Piece] | DataError],
    ) -> None:
        """Adds to the chunk's errors where the tokens are not what the conversation says.

        Args:
            tokens: the chunk's ids.
            layout: [tokens], False where the token comes from data.
            plans: the pieces of each conversation.
        """
        starts, ends = _runs(chunk.loss_mask, chunk.offsets)
        decoded = self._encoder.decode([tokens[start:end] for start, end in zip(starts, ends, strict=True)])
        first = np.searchsorted(starts, chunk.offsets).tolist()  # the first run of each conversation
        stray = np.flatnonzero(self._encoder.is_control[chunk.input_ids] & ~layout)
        strays = set((np.searchsorted(chunk.offsets, stray, side="right") - 1).tolist())
        for number, (conversation, plan) in enumerate(zip(conversations, plans, strict=True)):
            if isinstance(plan, DataError):
                continue
            said = decoded[first[number] : first[number + 1]]
            if number in strays:
                faults = ["messages: the tokenizer makes a control token of plain text"]
            elif not said:
                faults = ["the conversation has no supervised token"]
            else:
                faults = self.family.mask_faults(conversation, plan, said)
            if faults:
                chunk.errors[number] = DataError(faults)


def render(
    conversation: Conversation | Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    family: str = "auto",
    options: ChatOptions | None = None,
) -> Rendered:
    """One conversation as token ids with a verified loss mask.

    Args:
        conversation: a Conversation, whose messages passed ``validate_messages``; or a mapping with ``messages``
            and ``tools``, which is validated here.
        tokenizer: the model's own.
        family: ``qwen3``, ``harmony`` (gpt-oss), ``template`` (the tokenizer's chat template), or ``auto``.
        options: instead of ``family``, with the other choices.

    Raises:
        DataError: the conversation cannot be rendered, or its mask did not pass the check.
    """
    rendered = render_many([conversation], tokenizer, family=family, options=options)[0]
    if isinstance(rendered, DataError):
        raise rendered
    return rendered


def render_many(
    conversations: Sequence[Conversation | Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    family: str = "auto",
    options: ChatOptions | None = None,
) -> list[Rendered | DataError]:
    """Like :func:`render` for many at once (tokenised in one call), with the error in place of what was refused."""
    talks = [_validated(conversation) for conversation in conversations]
    good = [talk for talk in talks if isinstance(talk, Conversation)]
    chunk = renderer(tokenizer, options or ChatOptions(family)).chunk(good)
    results = iter(_rendered(chunk))
    return [talk if isinstance(talk, DataError) else next(results) for talk in talks]


def render_prompt(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: list[dict[str, Any]] | None = None,
    family: str = "auto",
    options: ChatOptions | None = None,
) -> list[int]:
    """The ids after which the model generates the next assistant turn, as it was trained to.

    Raises:
        DataError: the messages cannot be rendered.
    """
    talk = Conversation([without_none(message) for message in messages], without_none(tools) or None)
    return renderer(tokenizer, options or ChatOptions(family)).prompt(talk)


def renderer(tokenizer: PreTrainedTokenizerBase, options: ChatOptions) -> Renderer:
    """The renderer of a tokenizer; the last few are kept, since making one reads the whole vocabulary."""
    return _renderer(tokenizer, options, len(tokenizer), str(tokenizer.chat_template))


@lru_cache(maxsize=4)
def _renderer(tokenizer: PreTrainedTokenizerBase, options: ChatOptions, tokens: int, template: str) -> Renderer:
    """``tokens`` and ``template`` are what may change about a tokenizer between two calls."""
    return Renderer(tokenizer, options)


def resolve_family(tokenizer: PreTrainedTokenizerBase, family: str = "auto") -> str:
    """``qwen3``, ``harmony`` or ``template``.

    ``auto`` is harmony where the tokenizer has gpt-oss's tokens, and qwen3 where it has Qwen3's and its own template,
    if it has one, writes what ours does: other models share these tokens but not the layout.

    Raises:
        ConfigError: the family is unknown, or the tokenizer lacks its tokens.
    """
    if family not in FAMILIES:
        raise ConfigError(f"chat family {family!r} is unknown: use one of {', '.join(FAMILIES)}")
    if family == "template":
        return family
    needed = {"qwen3": QWEN3_TOKENS, "harmony": HARMONY_TOKENS}
    known = tokenizer.get_added_vocab()
    missing = {name: [token for token in tokens if token not in known] for name, tokens in needed.items()}
    if family != "auto":
        if missing[family]:
            raise ConfigError(f"chat family {family}: the tokenizer has no token {', '.join(missing[family])}")
        return family
    if not missing["harmony"]:
        return "harmony"
    return "template" if missing["qwen3"] or not _template_agrees(tokenizer) else "qwen3"


def _family(name: str, tokenizer: PreTrainedTokenizerBase, options: ChatOptions) -> Family:
    if name == "qwen3":
        return Qwen3()
    if name == "harmony":
        return Harmony(options.date, options.reasoning_effort)
    return Template(tokenizer, options.date)


def _template_agrees(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's own template, if any, writes what our Qwen3 layout writes."""
    if not tokenizer.chat_template:
        return True
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    messages: list[Message] = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {
            "role": "assistant",
            "content": "a",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}],
        },
    ]
    try:
        theirs = tokenizer.apply_chat_template(messages, tools=[tool], tokenize=False)
    except (TemplateError, TypeError, ValueError, KeyError, IndexError):
        return False
    messages[2]["tool_calls"][0]["function"]["arguments"] = "{}"
    return bool(theirs == "".join(piece.text for piece in Qwen3().pieces(Conversation(messages, [tool]))))


def _validated(conversation: Conversation | Mapping[str, Any]) -> Conversation | DataError:
    if isinstance(conversation, Conversation):
        return conversation
    try:
        return validate_conversation(conversation.get("messages"), conversation.get("tools"))
    except DataError as error:
        return error


def _refuse_silence(conversation: Conversation) -> None:
    """An empty turn teaches silence."""
    for position, message in enumerate(conversation.messages):
        if message["role"] != "assistant" or message.get("tool_calls"):
            continue
        if not message.get("content", "").strip() and not any(message.get(key) for key in REASONING_KEYS):
            raise DataError(f"messages[{position}].content: is empty, so there is nothing to learn")


def _ends(counts: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """[counts + 1], where each of neighbouring parts begins, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _turn_ends(supervised: NDArray[np.bool_], layout: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[tokens], True for the control token that ends a turn, itself a target or the token after one.

    Where targets stop before more data, the turn goes on: part of it is kept out of the loss.
    """
    after = np.append(supervised[1:], False)
    ends: NDArray[np.bool_] = supervised & layout & ~after
    ends[1:] |= supervised[:-1] & ~layout[:-1] & layout[1:] & ~supervised[1:]
    return ends


def _runs(mask: NDArray[np.bool_], offsets: NDArray[np.int64]) -> tuple[list[int], list[int]]:
    """Where each run of True begins and ends; none reaches over the beginning of a sample."""
    first = np.zeros(len(mask) + 1, dtype=np.bool_)
    first[offsets] = True  # the first token of each sample, and the end
    before = np.concatenate([[False], mask])
    after = np.concatenate([mask, [False]])
    starts = after & (~before | first)
    ends = before & (~after | first)
    return np.flatnonzero(starts).tolist(), np.flatnonzero(ends).tolist()


def _without_refused(chunk: Chunk) -> Chunk:
    """The chunk with no tokens for the conversations that were refused."""
    lengths = np.diff(chunk.offsets)
    kept = np.ones(len(lengths), dtype=np.bool_)
    kept[list(chunk.errors)] = False
    if not lengths[~kept].any():
        return chunk
    taken = np.repeat(kept, lengths)
    return Chunk(
        input_ids=chunk.input_ids[taken],
        loss_mask=chunk.loss_mask[taken],
        turn_ends=chunk.turn_ends[taken],
        offsets=_ends(np.where(kept, lengths, 0)),
        errors=chunk.errors,
    )


def _rendered(chunk: Chunk) -> list[Rendered | DataError]:
    ids, mask = chunk.input_ids.tolist(), chunk.loss_mask.tolist()
    bounds = zip(chunk.offsets[:-1].tolist(), chunk.offsets[1:].tolist(), strict=True)
    return [
        chunk.errors[number] if number in chunk.errors else Rendered(ids[start:end], mask[start:end])
        for number, (start, end) in enumerate(bounds)
    ]
