"""Greedy decoding with a model in this process's memory, outside of any backend."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from transformers import PreTrainedModel

from numina_finetune.models.generation import PlainDecoder, at_rest
from numina_finetune.train.backend import Decoding
from numina_finetune.train.decoding import decode


def generate_greedy(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    pad_id: int,
    batch_size: int,
) -> list[list[int]]:
    """The most likely continuation of each prompt, see :meth:`numina_finetune.train.backend.Backend.generate`.

    Args:
        model: a causal language model on any one device; it is run in eval mode.
    """
    decoding = Decoding(max_new_tokens, frozenset(eos_ids), pad_id, batch_size)
    with at_rest(model):
        found = decode(PlainDecoder(model), prompts, decoding, None, rows=batch_size)
    return [found[number] for number in range(len(prompts))]
