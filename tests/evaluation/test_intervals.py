"""Intervals and tests are those of the papers they are named after."""

from __future__ import annotations

import pytest

from numina_finetune.evaluation.intervals import (
    bootstrap_difference,
    mcnemar_exact,
    mean_interval,
    newcombe_paired,
    pass_at_k,
    wilson_interval,
)


def rounded(interval: tuple[float, float]) -> tuple[float, float]:
    return round(interval[0], 4), round(interval[1], 4)


def test_the_wilson_interval_is_that_of_the_textbook() -> None:
    # Brown, Cai and DasGupta (2001), equation 4, for 8 of 10.
    assert rounded(wilson_interval(8, 10)) == (0.4902, 0.9433)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(5, 5)[1] == 1.0


def test_the_paired_difference_is_newcombes() -> None:
    # Newcombe (1998), method 10, on the counts 36, 12, 2, 0; the paper takes the first share minus the second.
    low, high = newcombe_paired(36, 12, 2, 0)
    assert rounded((-high, -low)) == (0.0569, 0.3404)
    low, high = newcombe_paired(54, 0, 0, 0)  # none differs: what is left is the uncertainty of both shares
    assert -low == pytest.approx(high) and high == pytest.approx(1 - wilson_interval(54, 54)[0])
    assert newcombe_paired(0, 0, 0, 0) == (-1.0, 1.0)


def test_mcnemars_exact_p_is_the_binomial_one() -> None:
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(5, 5) == 1.0
    assert mcnemar_exact(0, 5) == pytest.approx(2 / 2**5)
    assert mcnemar_exact(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    assert mcnemar_exact(700, 900) == pytest.approx(6.3e-7, rel=0.05)


def test_pass_at_k_is_the_unbiased_estimator() -> None:
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(4, 1, 2) == pytest.approx(0.5)
    assert pass_at_k(4, 0, 4) == 0.0
    assert pass_at_k(4, 3, 2) == 1.0
    with pytest.raises(ValueError, match="pass@5 needs 5 attempts"):
        pass_at_k(4, 2, 5)


def test_several_attempts_count_by_problem_and_equal_shares_are_no_certainty() -> None:
    low, high = mean_interval([0.0, 0.5, 1.0, 0.5])
    assert (low + high) / 2 == pytest.approx(0.5)
    assert high - low == pytest.approx(2 * 1.96 * 0.40825 / 2, rel=1e-3)
    assert mean_interval([0.0] * 20) == wilson_interval(0, 20)


def test_the_bootstrap_of_a_difference_holds_it_and_repeats_itself() -> None:
    first, second = [0.0, 0.25, 0.5, 0.75] * 10, [0.25, 0.25, 0.5, 1.0] * 10
    low, high = bootstrap_difference(first, second)
    assert low < 0.125 < high
    assert bootstrap_difference(first, second) == (low, high)
    assert bootstrap_difference(first, first) == (0.0, 0.0)
