import numpy as np
import pytest

from numina_finetune.data.mixture import Mixture
from numina_finetune.errors import ConfigError


def test_shares_are_exact_in_every_block():
    sources, _ = Mixture([3, 1], seed=0, block_rows=8).rows(0, 80)
    for block in sources.reshape(10, 8):
        assert np.bincount(block).tolist() == [6, 2]


def test_each_source_gives_its_rows_in_order_without_gaps():
    sources, cursors = Mixture([0.5, 0.3, 0.2], seed=1, block_rows=16).rows(0, 1000)
    for source in range(3):
        given = cursors[sources == source]
        assert given.tolist() == list(range(len(given)))


def test_seeking_gives_the_same_rows_as_walking():
    walked = Mixture([2, 1], seed=3, block_rows=32).rows(0, 500)
    for first in (0, 31, 32, 250):
        sought = Mixture([2, 1], seed=3, block_rows=32).rows(first, 70)
        assert all((a[first : first + 70] == b).all() for a, b in zip(walked, sought, strict=True))


def test_cursors_count_the_rows_given():
    mixture = Mixture([2, 1], seed=3, block_rows=32)
    sources, _ = mixture.rows(0, 500)
    for rows in (0, 1, 31, 32, 33, 499):
        assert mixture.cursors(rows).tolist() == np.bincount(sources[:rows], minlength=2).tolist()


def test_rows_until_is_where_the_cursor_is_first_reached():
    mixture = Mixture([2, 1], seed=3, block_rows=32)
    for cursor in (1, 5, 11, 40):
        rows = mixture.rows_until(1, cursor)
        assert mixture.cursors(rows)[1] == cursor and mixture.cursors(rows - 1)[1] == cursor - 1


def test_weight_that_would_never_be_met_is_refused():
    with pytest.raises(ConfigError, match="too small"):
        Mixture([1, 1e-6], seed=0)
