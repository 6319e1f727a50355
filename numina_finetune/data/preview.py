"""One training sample as the model will see it, with its targets marked.

Without colour, targets stand between ``⟦`` and ``⟧``::

    sample 0: 27 tokens, 2 supervised (7.4 %)
    <|im_start|>user
    2+2?<|im_end|>
    <|im_start|>assistant
    ⟦4<|im_end|>⟧
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from numina_finetune.data.chat import Rendered
from numina_finetune.data.loader import NO_LOSS, Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OPEN, _CLOSE = "⟦", "⟧"

_STYLES = {
    (True, False): "\x1b[1;32m",  # bold green
    (True, True): "\x1b[1;30;42m",  # black on green
    (False, False): "\x1b[2m",  # dim
    (False, True): "\x1b[36m",  # cyan
}
"""(is a target, is a control token) -> what turns the terminal's style on."""
_RESET = "\x1b[0m"

_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_MARKS = re.compile(f"[{_OPEN}{_CLOSE}]")

_REPLACEMENT = "\ufffd"


def preview(
    rendered: Rendered,
    tokenizer: PreTrainedTokenizerBase,
    *,
    color: bool,
    show_ids: bool = False,
    number: int | None = None,
) -> str:
    """A header line and the sample's text, control tokens included.

    Text is decoded in runs of neighbouring tokens, so that a character of several tokens is whole; where it is not,
    the sample cuts it. Control characters in the data are shown escaped (``\\x1b``).

    Args:
        color: targets bold green, the rest dim, control tokens set apart from text that only spells them, and ``↵``
            at each line's end that is a target. False: targets between ``⟦`` and ``⟧``, which the data's own are
            escaped for.
        show_ids: the ids behind each token's text: ``2⟨17⟩``.
        number: of the sample, where the header is to name it.
    """
    runs = groupby(zip(rendered.input_ids, rendered.loss_mask, strict=True), key=lambda token: token[1])
    body = []
    for supervised, run in runs:
        parts = list(_parts([token for token, _ in run], tokenizer, show_ids))
        if color:
            body += [_styled(text, supervised, control) for text, control in parts]
        else:
            text = "".join(_MARKS.sub(_escaped, text) for text, _ in parts)
            body.append(f"{_OPEN}{text}{_CLOSE}" if supervised else text)
    return f"{_header(rendered, number)}\n{''.join(body)}"


def packed_samples(batch: Batch, row: int) -> Iterator[Rendered]:
    """The samples of a row, apart again; labels stand one position before their token."""
    ids, segments = batch.input_ids[row], batch.segment_ids[row]
    is_target = np.concatenate([[False], batch.labels[row, :-1] != NO_LOSS])
    for segment in range(1, int(segments.max()) + 1):
        where = segments == segment
        yield Rendered(ids[where].tolist(), is_target[where].tolist())


def printable(text: str) -> str:
    """The text with everything escaped (``\\x1b``) that would steer a terminal, turn a line's direction, or not encode;
    line feeds and tabs stay."""
    return _UNSAFE.sub(_escaped, text)


def _header(rendered: Rendered, number: int | None) -> str:
    tokens, supervised = len(rendered.input_ids), sum(rendered.loss_mask)
    name = "" if number is None else f"sample {number}: "
    return f"{name}{tokens} tokens, {supervised} supervised ({100 * supervised / max(tokens, 1):.1f} %)"


def _parts(ids: list[int], tokenizer: PreTrainedTokenizerBase, show_ids: bool) -> Iterator[tuple[str, bool]]:
    """Printable text and whether it is control tokens, of neighbouring tokens that decode together."""
    controls = tokenizer.added_tokens_decoder
    for control, group in groupby(ids, key=lambda token: token in controls):
        for piece in _characters(list(group), tokenizer) if show_ids else [list(group)]:
            text = printable(_decoded(piece, tokenizer))
            yield (f"{text}⟨{' '.join(map(str, piece))}⟩" if show_ids else text), control


def _characters(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Token by token, but those that share a character stay together."""
    piece: list[int] = []
    for token in ids:
        piece.append(token)
        if not _decoded(piece, tokenizer).endswith(_REPLACEMENT):
            yield piece
            piece = []
    if piece:
        yield piece


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _styled(text: str, supervised: bool, control: bool) -> str:
    """Each line in its own style codes: pagers forget the style at a line's end."""
    style = _STYLES[supervised, control]
    lines = (text.replace("\n", "↵\n") if supervised else text).split("\n")
    return "\n".join(f"{style}{line}{_RESET}" if line else "" for line in lines)


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")
