"""Decoding many prompts on a backend: batches, what is read back and when, and where a row ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from numina_finetune.models.generation import READ_EVERY, Prompts
from numina_finetune.models.sampling import uniforms
from numina_finetune.train.backend import Decoding, DecodingStopped, Ended

LEAST_TEMPERATURE = 1e-5
"""A temperature above 0 and below this one would overflow the scores that it divides."""


class Decoder(Protocol):
    """A model on devices that decodes one batch at a time."""

    def shape(self, rows: int, longest: int) -> tuple[int, int]:
        """Rows and padded width that a batch of so many prompts, the longest so long, is given."""

    def begin(self, prompts: Prompts, new_tokens: int) -> None:
        """Take a batch (on the host), and give each row its first token.

        Args:
            new_tokens: how many tokens a row may get in all.
        """

    def advance(self) -> None:
        """Give each row its next token; reads nothing back."""

    def recent(self) -> torch.Tensor:
        """The newest tokens on the host, see :attr:`numina_finetune.models.generation.Rows.recent`."""

    def end(self, ended: torch.Tensor) -> None:
        """Let these rows (bool ``[batch]``, on the host) go on with padding."""


def decode(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    ended: Ended | None,
    *,
    rows: int,
    share: tuple[int, int] = (0, 1),
    any_busy: Callable[[bool], bool] | None = None,
    stop: Callable[[], bool] | None = None,
) -> dict[int, list[int]]:
    """New tokens by the prompt's number, see :meth:`numina_finetune.train.backend.Backend.generate`.

    Prompts of like length are decoded together, the longest first: what does not fit into memory shows at once.

    Args:
        rows: how many are decoded together at most.
        share: process i of n, which takes every nth batch.
        any_busy: whether any process has rows that have not ended, from whether this one has. Given where the weights
            are split over the processes: each forward pass gathers them, so that all make equally many.

    Raises:
        ValueError: an empty prompt.
        DecodingStopped: as ``stop`` says, which is asked before each batch, before its second token (whose program may
            have to be compiled) and wherever tokens are read.
    """
    if not all(prompts):
        raise ValueError("a prompt is empty: give at least one token")
    if decoding.max_new_tokens < 1:
        return {number: [] for number in range(len(prompts))}
    repeats = _repeats(prompts)
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    batches = [order[start : start + rows] for start in range(0, len(order), rows)]
    found: dict[int, list[int]] = {}
    own = batches[share[0] :: share[1]]
    if any_busy is not None:  # a process that has none left decodes the last one along with its owner
        own += batches[-1:] * (-(-len(batches) // share[1]) - len(own))
    for batch in own:
        _go_on(stop)
        longest = len(prompts[batch[0]])
        held, width = decoder.shape(len(batch), longest)
        filled = batch + batch[-1:] * (held - len(batch))
        given = _prompts(
            [prompts[number] for number in filled], [repeats[number] for number in filled], width, decoding
        )
        completions = _decode_batch(decoder, given, len(batch), decoding, ended, any_busy or bool, stop)
        found |= dict(zip(batch, completions, strict=True))
    return found


def _repeats(prompts: Sequence[Sequence[int]]) -> list[int]:
    """How many equal prompts stand before each one."""
    seen: Counter[tuple[int, ...]] = Counter()
    found = []
    for prompt in map(tuple, prompts):
        found.append(seen[prompt])
        seen[prompt] += 1
    return found


def _prompts(prompts: Sequence[Sequence[int]], repeats: Sequence[int], width: int, decoding: Decoding) -> Prompts:
    ids = np.full((len(prompts), width), decoding.pad_id, np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    noise = np.zeros((len(prompts), 0), np.float32)
    if decoding.temperature > 0:
        drawn = zip(prompts, repeats, strict=True)
        noise = np.stack([uniforms(*each, decoding.max_new_tokens, decoding.seed) for each in drawn])
    temperature = max(decoding.temperature, LEAST_TEMPERATURE)
    return Prompts(
        ids=torch.from_numpy(ids),
        first=torch.tensor([width - len(prompt) for prompt in prompts], dtype=torch.int32),
        stops=torch.tensor(sorted(decoding.stop_ids) or [-1], dtype=torch.int32),
        pad=torch.tensor([decoding.pad_id], dtype=torch.int32),
        controls=torch.tensor([temperature, decoding.top_p, decoding.top_k], dtype=torch.float32),
        uniforms=torch.from_numpy(noise),
    )


def _decode_batch(
    decoder: Decoder,
    prompts: Prompts,
    real: int,
    decoding: Decoding,
    ended: Ended | None,
    any_busy: Callable[[bool], bool],
    stop: Callable[[], bool] | None,
) -> list[list[int]]:
    """New tokens of the first ``real`` rows; the others only fill the batch up."""
    completions: list[list[int]] = [[] for _ in range(real)]
    over = [False] * real + [True] * (len(prompts.ids) - real)
    decoder.begin(prompts, decoding.max_new_tokens)
    for count in range(1, decoding.max_new_tokens + 1):
        if count == 2:
            _go_on(stop)
        if count > 1:
            decoder.advance()
        if count % READ_EVERY and count < decoding.max_new_tokens:
            continue
        _go_on(stop)
        newest = decoder.recent()[:real, : (count - 1) % READ_EVERY + 1].tolist()
        for row, tokens in enumerate(newest):
            if not over[row]:
                completions[row] += _until_stop(tokens, decoding.stop_ids)
                stopped = completions[row][-1] in decoding.stop_ids
                over[row] = stopped or (ended is not None and ended(completions[row]))
        if not any_busy(not all(over)):
            break
        if ended is not None:
            decoder.end(torch.tensor(over))
    return completions


def _go_on(stop: Callable[[], bool] | None) -> None:
    if stop is not None and stop():
        raise DecodingStopped


def _until_stop(tokens: list[int], stop_ids: frozenset[int]) -> list[int]:
    for position, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[: position + 1]
    return tokens
