"""Batches of one fixed shape, in an order that depends on the data, the seed and the epoch only.

The rows of a run are one infinite sequence: each epoch is a packing of all samples, shuffled anew; with weights, each
source has such a sequence of its own and a mixture takes turns among them. Any row can be made without the rows
before it, so a resumed run starts where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from numina_finetune.data.mixture import Mixture
from numina_finetune.data.packing import Packing, one_per_row, pack
from numina_finetune.data.token_index import TokenIndex
from numina_finetune.errors import DataError

NO_LOSS = -100
PLANS_KEPT = 2
"""Epochs whose packing stays in memory: a batch may reach into the next one."""


class Batch(NamedTuple):
    """Rows of packed samples; every array is int32 [rows, seq_len]."""

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    """Target of each position: the next token of the same sample, or ``NO_LOSS``."""
    segment_ids: NDArray[np.int32]
    """0 for padding, 1… for the samples of a row."""
    position_ids: NDArray[np.int32]
    """From 0 in each sample."""


def supervised_tokens(batch: Batch) -> int:
    """Positions of the batch that have a loss."""
    return int(np.count_nonzero(batch.labels != NO_LOSS))


class Loader:
    """The rows of a run.

    Args:
        index: the samples; none longer than ``seq_len``.
        seq_len: tokens of a row.
        packing: several samples in a row, or one.
        seed: of the order.
        pad_id: token of the padding.
        weights: share of the rows of each source; None = one sequence of all samples.
        shuffle: False keeps the samples in their order (packed ones in the order of the packing), in every epoch.

    Raises:
        DataError: a weighted source has no samples, or a sample is longer than ``seq_len``.
        ConfigError: a weight is too small to be met.
    """

    def __init__(
        self,
        index: TokenIndex,
        *,
        seq_len: int,
        packing: bool,
        seed: int,
        pad_id: int,
        weights: Sequence[float] | None = None,
        shuffle: bool = True,
    ) -> None:
        self._index = index
        self._seq_len = seq_len
        self._pad_id = pad_id
        members = _by_source(index, len(weights)) if weights is not None else [np.arange(len(index))]
        self._pools = [
            _Pool(index, samples, seq_len, packing, seed if shuffle else None, position)
            for position, samples in enumerate(members)
        ]
        self._mixture = Mixture(weights, seed) if weights is not None else None

    @property
    def rows_per_epoch(self) -> int:
        """Rows of one pass over the data; with weights, until the first source has been seen whole."""
        return self.rows_for_epochs(1)

    def rows_for_epochs(self, epochs: float) -> int:
        """Rows of ``epochs`` passes; with weights, until the first source to finish has finished its passes."""
        goals = [max(1, round(epochs * pool.rows)) for pool in self._pools]
        if self._mixture is None:
            return goals[0]
        return min(self._mixture.rows_until(source, goal) for source, goal in enumerate(goals))

    def batch(self, first_row: int, count: int, end_row: int | None = None) -> Batch:
        """The rows ``first_row`` … ``first_row + count`` of the infinite sequence; those from ``end_row`` on empty."""
        shape = (count, self._seq_len)
        batch = Batch(
            input_ids=np.full(shape, self._pad_id, dtype=np.int32),
            labels=np.full(shape, NO_LOSS, dtype=np.int32),
            segment_ids=np.zeros(shape, dtype=np.int32),
            position_ids=np.zeros(shape, dtype=np.int32),
        )
        filled = count if end_row is None else min(count, max(0, end_row - first_row))
        sources, cursors = self._turns(first_row, filled)
        for row in range(filled):
            samples = self._pools[sources[row]].samples(int(cursors[row]))
            _fill(batch, row, [self._index.sample(int(sample)) for sample in samples])
        return batch

    def progress(self, rows: int) -> dict[str, Any]:
        """Where each source stands after ``rows`` rows; plain numbers for a checkpoint or a report."""
        cursors = [rows] if self._mixture is None else self._mixture.cursors(rows).tolist()
        return {
            "rows": rows,
            "sources": [
                {"cursor": cursor, "rows_per_epoch": pool.rows, "epoch": cursor // pool.rows}
                for cursor, pool in zip(cursors, self._pools, strict=True)
            ],
        }

    def _turns(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Pool, and row within it, of each row: two arrays, [count]."""
        if self._mixture is not None:
            return self._mixture.rows(first, count)
        return np.zeros(count, dtype=np.int64), np.arange(first, first + count, dtype=np.int64)


class _Pool:
    """The infinite row sequence of some samples: one packing an epoch."""

    def __init__(
        self,
        index: TokenIndex,
        samples: NDArray[np.int64],
        seq_len: int,
        packing: bool,
        seed: int | None,
        position: int,
    ) -> None:
        if not len(samples):
            raise DataError(f"dataset {position + 1} of the mixture has no samples left to train on")
        self._lengths = index.lengths[samples]
        if self._lengths.max() > seq_len:
            raise DataError(f"a sample has {self._lengths.max()} tokens, but the rows have {seq_len}")
        self._samples = samples
        self._capacity = seq_len if packing else None
        # the order belongs to the data: equal tokens under another name, or in another cache, give the same rows
        self._entropy = None if seed is None else [int(index.data_key[:16], 16), seed, position]
        self._plans: dict[int, Packing] = {}
        self.rows = self._plan(0).rows

    def samples(self, row: int) -> NDArray[np.int64]:
        """The samples of one row of the sequence."""
        epoch, number = divmod(row, self.rows)
        return np.asarray(self._samples[self._plan(epoch).row(number)])

    def _plan(self, epoch: int) -> Packing:
        if self._entropy is None:
            epoch = 0
        if epoch not in self._plans:
            while len(self._plans) >= PLANS_KEPT:
                del self._plans[next(iter(self._plans))]
            self._plans[epoch] = self._make_plan(epoch)
        return self._plans[epoch]

    def _make_plan(self, epoch: int) -> Packing:
        rng = None
        if self._entropy is not None:
            rng = np.random.default_rng(np.random.SeedSequence([*self._entropy, epoch]))
        if self._capacity is None:
            return one_per_row(len(self._samples), rng)
        return pack(self._lengths, self._capacity, rng)


def _by_source(index: TokenIndex, count: int) -> list[NDArray[np.int64]]:
    return [np.flatnonzero(index.sources == source) for source in range(count)]


def _fill(batch: Batch, row: int, samples: list[tuple[NDArray[np.int32], NDArray[np.bool_]]]) -> None:
    """Writes samples into one row, side by side."""
    start = 0
    for segment, (ids, mask) in enumerate(samples, start=1):
        end = start + len(ids)
        batch.input_ids[row, start:end] = ids
        batch.labels[row, start : end - 1] = np.where(mask[1:], ids[1:], NO_LOSS)
        batch.segment_ids[row, start:end] = segment
        batch.position_ids[row, start:end] = np.arange(len(ids))
        start = end
