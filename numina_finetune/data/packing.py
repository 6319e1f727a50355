"""Which samples share a row of the batch.

Four samples of 5, 4, 3 and 2 tokens in rows of 8, and the arrays that keep them apart (``.`` is padding)::

    tokens       a a a a a c c c      b b b b d d . .
    segment_ids  1 1 1 1 1 2 2 2      1 1 1 1 2 2 0 0
    position_ids 0 1 2 3 4 0 1 2      0 1 2 3 0 1 0 0
    labels       a a a a - c c -      b b b - d - - -      the next token of the same sample; - = no loss

    attention of row 1 (causal within a segment):
        a x . . . . . . .
        a x x . . . . . .
        a x x x . . . . .
        a x x x x . . . .
        a x x x x x . . .
        c . . . . . x . .
        c . . . . . x x .
        c . . . . . x x x
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Packing:
    """The samples of each row, in order."""

    row_offsets: NDArray[np.int64]
    """[rows + 1]; row r holds ``samples[row_offsets[r]:row_offsets[r + 1]]``."""
    samples: NDArray[np.int32]
    """[samples]; each sample once."""

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(self.row_offsets) - 1

    def row(self, number: int) -> NDArray[np.int32]:
        """[samples of the row], their numbers in order."""
        return self.samples[self.row_offsets[number] : self.row_offsets[number + 1]]


def pack(lengths: NDArray[np.integer], capacity: int, rng: np.random.Generator | None) -> Packing:
    """Best-fit decreasing: the longest sample first, each into the fullest row that still takes it.

    The shapes of the rows depend on the multiset of lengths only, so every epoch has equally many; ``rng`` chooses
    among samples of equal length, and the order of the rows.

    Args:
        lengths: [samples], tokens of each.
        capacity: tokens a row takes.
        rng: None leaves ties and rows in their order.

    Raises:
        ValueError: a length is below 1 or above ``capacity``.

    Source: D. S. Johnson, "Near-optimal bin packing algorithms", 1973.
    """
    if len(lengths) and not (lengths.min() >= 1 and lengths.max() <= capacity):
        raise ValueError(f"lengths from {lengths.min()} to {lengths.max()} do not fit rows of {capacity} tokens")
    shuffled = permutation(rng, len(lengths))
    by_length = shuffled[np.argsort(-lengths[shuffled].astype(np.int64), kind="stable")]
    row_of, rows = _best_fit(lengths[by_length], capacity)
    place = permutation(rng, rows)  # row as built -> row of the plan
    order = np.argsort(place[row_of], kind="stable")
    sizes = np.bincount(place[row_of], minlength=rows)
    return Packing(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), by_length[order].astype(np.int32))


def one_per_row(count: int, rng: np.random.Generator | None) -> Packing:
    """The unpacked form: ``count`` rows of one sample each."""
    return Packing(np.arange(count + 1, dtype=np.int64), permutation(rng, count).astype(np.int32))


def permutation(rng: np.random.Generator | None, count: int) -> NDArray[np.int64]:
    """[count], a random order, or 0, 1, 2 … without ``rng``.

    NumPy promises the raw bits of a bit generator across versions, and ``Generator.permutation`` not; a run must
    continue the same after an upgrade.
    """
    if rng is None:
        return np.arange(count, dtype=np.int64)
    return np.argsort(rng.bit_generator.random_raw(count), kind="stable").astype(np.int64)


def _best_fit(lengths: NDArray[np.integer], capacity: int) -> tuple[NDArray[np.int64], int]:
    """Row of each sample ([samples], for lengths in descending order), and the number of rows.

    Rows are kept in buckets by the space left, and equal lengths are placed together: the fullest row that takes one
    is still the fullest that takes the next, until it takes no more, so it gets ``space // length`` of them at once.
    """
    row_of = np.empty(len(lengths), dtype=np.int64)
    rows = 0
    buckets: dict[int, list[int]] = {}  # space left -> rows
    spaces: list[int] = []  # the keys of buckets, ascending
    bounds = [*np.flatnonzero(np.diff(lengths, prepend=-1)).tolist(), len(lengths)]
    for start, stop in pairwise(bounds):
        length = int(lengths[start])
        while start < stop:
            found = bisect_left(spaces, length)
            space = spaces[found] if found < len(spaces) else capacity
            each = space // length
            wanted = -(-(stop - start) // each)
            if found < len(spaces):
                bucket = buckets[space]
                chosen = bucket[-wanted:]
                del bucket[-wanted:]
                if not bucket:
                    del buckets[space], spaces[found]
            else:
                chosen = list(range(rows, rows + wanted))
                rows += wanted
            placed = min(stop - start, len(chosen) * each)
            row_of[start : start + placed] = np.repeat(chosen, each)[:placed]
            start += placed
            in_last = placed - (len(chosen) - 1) * each
            _put(buckets, spaces, space - each * length, chosen[:-1])
            _put(buckets, spaces, space - in_last * length, chosen[-1:])
    return row_of, rows


def _put(buckets: dict[int, list[int]], spaces: list[int], space: int, rows: list[int]) -> None:
    if not rows or not space:
        return
    if space not in buckets:
        buckets[space] = []
        insort(spaces, space)
    buckets[space] += rows
