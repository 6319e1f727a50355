import numpy as np
import pytest

from numina_finetune.data.packing import one_per_row, pack


def best_fit_decreasing(lengths, capacity):
    """The textbook algorithm; the fill of each row."""
    rows = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return sorted(map(sum, rows))


def rows_of(packing):
    return [packing.row(number).tolist() for number in range(packing.rows)]


def test_rows_are_those_of_best_fit_decreasing_with_each_sample_once():
    rng = np.random.default_rng(0)
    for case in range(300):
        capacity = int(rng.integers(1, 60))
        lengths = rng.integers(1, capacity + 1, int(rng.integers(0, 70)))
        packing = pack(lengths, capacity, np.random.default_rng(case))
        assert sorted(packing.samples.tolist()) == list(range(len(lengths)))
        fills = sorted(int(lengths[row].sum()) for row in rows_of(packing))
        assert fills == best_fit_decreasing(lengths.tolist(), capacity)


def test_same_seed_same_packing_and_other_seeds_shuffle_an_equal_number_of_rows():
    lengths = np.random.default_rng(1).integers(1, 65, 500)
    first, again, other = (pack(lengths, 64, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert rows_of(first) == rows_of(again)
    assert first.rows == other.rows and rows_of(first) != rows_of(other)


def test_number_of_rows_does_not_depend_on_the_order_of_samples():
    lengths = np.random.default_rng(1).integers(1, 65, 500)
    assert pack(lengths, 64, np.random.default_rng(0)).rows == pack(lengths[::-1], 64, np.random.default_rng(0)).rows


def test_sample_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="65"):
        pack(np.array([3, 65]), 64, None)


def test_unpacked_rows_hold_one_sample_each():
    packing = one_per_row(5, np.random.default_rng(0))
    assert sorted(rows_of(packing)) == [[0], [1], [2], [3], [4]]


def test_nine_hundred_thousand_samples_pack_in_seconds_and_tightly():
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 0.6, 900_000).astype(np.int64), 5, 4096)
    packing = pack(lengths, 4096, np.random.default_rng(0))
    assert lengths.sum() / (packing.rows * 4096) > 0.99
