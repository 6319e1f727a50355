"""Greedy decoding in batches of one fixed shape, with a preallocated key-value cache.

Every forward pass after the first has the shape ``[batch, 1]``, and the cache never grows, so that a compiling backend
sees two graphs in all.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache


@torch.no_grad()
def generate_greedy(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    pad_id: int,
    batch_size: int,
) -> list[list[int]]:
    """The most likely continuation of each prompt, token by token.

    Args:
        model: a causal language model with ``sdpa`` or ``eager`` attention, on any device; it is run in eval mode.
        prompts: token ids, of any lengths from 1.
        max_new_tokens: where a row that has not ended is cut.
        eos_ids: tokens that end a row.
        pad_id: fills the left of shorter prompts; never attended to.
        batch_size: rows of every forward pass; the last batch is filled up with a repeated prompt.

    Returns:
        The new tokens of each prompt, in order, with the token that ended the row.

    Raises:
        ValueError: an empty prompt.
    """
    if not all(prompts):
        raise ValueError("a prompt is empty: give at least one token")
    longest = max(map(len, prompts), default=0)
    was_training = model.training
    model.eval()
    completions: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        filled = batch + [batch[-1]] * (batch_size - len(batch))
        ids, mask = _left_padded(filled, longest, pad_id, model.device)
        tokens = _decode(model, ids, mask, max_new_tokens, set(eos_ids), pad_id)
        completions += [_until_end(row, eos_ids) for row in tokens.tolist()[: len(batch)]]
    model.train(was_training)
    return completions


def _left_padded(
    prompts: Sequence[Sequence[int]], length: int, pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both int64 ``[batch, length]``; the mask is 0 on padding."""
    ids = [[pad_id] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _decode(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, max_new_tokens: int, eos_ids: set[int], pad_id: int
) -> Tensor:
    """New tokens, int64 ``[batch, at most max_new_tokens]``; rows that have ended go on with ``pad_id``."""
    batch, prompt_length = ids.shape
    capacity = prompt_length + max_new_tokens
    cache = StaticCache(config=model.config, max_cache_len=capacity)
    # The mask covers the whole cache from the start, so that its shape never changes; the causal part hides the future.
    mask = torch.cat([mask, mask.new_ones(batch, max_new_tokens)], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    ends = torch.tensor(sorted(eos_ids), device=ids.device, dtype=ids.dtype)
    ended = torch.zeros(batch, dtype=torch.bool, device=ids.device)
    produced: list[Tensor] = []
    step_ids, step_positions = ids, positions[:, :prompt_length]
    for step in range(prompt_length, capacity):
        output = model(
            input_ids=step_ids,
            attention_mask=mask,
            position_ids=step_positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        token = output.logits[:, -1].argmax(dim=-1).masked_fill(ended, pad_id)
        produced.append(token)
        ended = ended | torch.isin(token, ends)
        if bool(ended.all()):
            break
        step_ids, step_positions = token[:, None], positions[:, step : step + 1]
    return torch.stack(produced, dim=1) if produced else ids[:, :0]


def _until_end(row: list[int], eos_ids: Collection[int]) -> list[int]:
    for position, token in enumerate(row):
        if token in eos_ids:
            return row[: position + 1]
    return row
