"""Weighted sources in closed form: which source gives row i, and which of its rows, without walking there.

The infinite sequence of rows is cut into blocks of fixed size. Each block gives every source the same number of rows,
its quota, in an order of the block's own::

    weights 3 : 1, blocks of 8     A A B A A A B A | B A A A A B A A | …
    cursor of B                        0       1     2         3
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from numina_finetune.data.packing import permutation
from numina_finetune.errors import ConfigError

BLOCK_ROWS = 4096


class Mixture:
    """The order in which weighted sources take turns.

    Args:
        weights: one per source, in any unit.
        seed: of the order inside the blocks.
        block_rows: shares are exact multiples of 1 / ``block_rows``.

    Raises:
        ConfigError: a weight is so small that its source would never be seen.
    """

    def __init__(self, weights: Sequence[float], seed: int, block_rows: int = BLOCK_ROWS) -> None:
        self.quotas = _quotas(weights, block_rows)
        self.block_rows = block_rows
        self._seed = seed
        self._block: tuple[int, NDArray[np.int64]] | None = None
        if not self.quotas.all():
            smallest = min(weights)
            raise ConfigError(
                f"--dataset-weight {smallest:g} is too small beside the others (in all {sum(weights):g}): "
                f"its source would never be seen, give it at least {sum(weights) / block_rows:g} or leave it out"
            )

    def rows(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source and cursor of the rows ``first`` … ``first + count``: two arrays, [count]."""
        sources, cursors = [], []
        row, end = first, first + count
        while row < end:
            number, position = divmod(row, self.block_rows)
            taken = min(self.block_rows - position, end - row)
            block = self._order(number)
            sources.append(block[position : position + taken])
            cursors.append((number * self.quotas[block] + _occurrence(block))[position : position + taken])
            row += taken
        empty = np.empty(0, dtype=np.int64)
        return np.concatenate([empty, *sources]), np.concatenate([empty, *cursors])

    def cursors(self, rows: int) -> NDArray[np.int64]:
        """[sources], how many rows each source has given after ``rows`` rows of the mixture."""
        number, position = divmod(rows, self.block_rows)
        begun = np.bincount(self._order(number)[:position], minlength=len(self.quotas))
        return number * self.quotas + begun

    def rows_until(self, source: int, cursor: int) -> int:
        """The fewest rows of the mixture of which ``cursor`` are ``source``'s."""
        if cursor < 1:
            return 0
        number, position = divmod(cursor - 1, int(self.quotas[source]))
        places = np.flatnonzero(self._order(number) == source)
        return number * self.block_rows + int(places[position]) + 1

    def _order(self, number: int) -> NDArray[np.int64]:
        """[block_rows], the source of each row of a block; the last one is remembered."""
        if self._block is None or self._block[0] != number:
            rng = np.random.default_rng(np.random.SeedSequence([self._seed, number]))
            members = np.repeat(np.arange(len(self.quotas)), self.quotas)
            self._block = number, members[permutation(rng, self.block_rows)]
        return self._block[1]


def _quotas(weights: Sequence[float], block_rows: int) -> NDArray[np.int64]:
    """[sources], whole rows of a block by largest remainder; ties go to the earlier source."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * block_rows
    quotas = np.floor(exact).astype(np.int64)
    largest = np.argsort(-(exact - quotas), kind="stable")
    quotas[largest[: block_rows - int(quotas.sum())]] += 1
    return quotas


def _occurrence(block: NDArray[np.int64]) -> NDArray[np.int64]:
    """[rows], how many earlier rows of the block have the same source."""
    order = np.argsort(block, kind="stable")
    sizes = np.bincount(block)
    within = np.arange(len(block)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    occurrence = np.empty_like(block)
    occurrence[order] = within
    return occurrence
