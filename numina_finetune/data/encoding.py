"""Text -> token ids and back, with a firm line between control tokens and data that spells their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from numina_finetune.data.families.pieces import Piece
from numina_finetune.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


class Encoder:
    """A tokenizer read in two ways: layout with its control tokens, data without them.

    Args:
        tokenizer: one with a backend of the ``tokenizers`` library.

    Raises:
        ConfigError: the tokenizer has no such backend.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(f"tokenizer {tokenizer.name_or_path}: has no fast form (tokenizer.json), which is needed")
        self._layout = backend
        self._data = _without_added_tokens(backend)
        self._layouts: dict[str, list[int]] = {}  # the few texts that chat layouts consist of
        added = sorted(tokenizer.added_tokens_decoder)
        self.is_control: NDArray[np.bool_] = np.zeros(max([*added, len(tokenizer)]) + 1, dtype=np.bool_)
        """[vocabulary], True for control tokens."""
        self.is_control[added] = True

    def encode(self, pieces: Sequence[Piece]) -> list[list[int]]:
        """The ids of each piece; all data in one call of the tokenizer."""
        texts = [piece.text for piece in pieces if not piece.layout]
        encoded = iter(self._data.encode_batch_fast(texts, add_special_tokens=False))
        return [self._layout_ids(piece.text) if piece.layout else next(encoded).ids for piece in pieces]

    def decode(self, spans: Iterable[list[int]]) -> list[str]:
        """The text of each run of ids, control tokens by name."""
        return list(self._layout.decode_batch(list(spans), skip_special_tokens=False))

    def _layout_ids(self, text: str) -> list[int]:
        ids = self._layouts.get(text)
        if ids is None:
            # the tokenizer's last call may have left its truncation and padding; its every call sets them anew
            self._layout.no_truncation()
            self._layout.no_padding()
            ids = self._layouts[text] = self._layout.encode(text, add_special_tokens=False).ids
        return ids


def _without_added_tokens(backend: Tokenizer) -> Tokenizer:
    """The same model (shared, not copied), which knows no control token: their names are text to it."""
    from tokenizers import Tokenizer

    plain = Tokenizer(backend.model)
    if backend.normalizer is not None:
        plain.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        plain.pre_tokenizer = backend.pre_tokenizer
    return plain
