"""How sure a measured share is, and a measured difference of two."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z_95 = 1.959963984540054
"""Two-sided 95% quantile of the normal distribution."""
RESAMPLES = 10_000
"""Of the bootstrap; its seed is fixed, so that the same results have the same interval."""


def wilson_interval(correct: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share, from ``correct`` out of ``n``; (0, 1) where nothing was tried."""
    if n == 0:
        return 0.0, 1.0
    share, spread = correct / n, Z_95**2 / n
    centre = share + spread / 2
    half = Z_95 * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    low, high = (centre - half) / (1 + spread), (centre + half) / (1 + spread)
    return max(0.0, min(low, share)), min(1.0, max(high, share))  # rounding may put an end beyond the share itself


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95% interval of the mean of shares by the central limit theorem, within [0, 1].

    For several attempts at each problem: problems are the sample, and a problem's share of right attempts is one value.
    Where all values are equal, which says nothing of how they vary, it is Wilson's for one attempt each.
    """
    if len(set(values)) < 2:
        return wilson_interval(sum(values), len(values))
    mean = float(np.mean(values))
    half = Z_95 * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return max(0.0, mean - half), min(1.0, mean + half)


def pass_at_k(attempts: int, right: int, k: int) -> float:
    """Probability that of ``k`` of the attempts at a problem, drawn without replacement, one is right.

    The unbiased estimator of M. Chen et al., "Evaluating large language models trained on code", 2021, equation 1.

    Raises:
        ValueError: ``k`` is more than ``attempts``.
    """
    if k > attempts:
        raise ValueError(f"pass@{k} needs {k} attempts at a problem, there are {attempts}")
    return 1.0 - math.comb(attempts - right, k) / math.comb(attempts, k)


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided p of McNemar's exact test: a fair coin decides each problem that only one of the two got right."""
    n, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, count) for count in range(fewer + 1))
    return min(1.0, tail / (1 << n - 1) if n else 1.0)  # of whole numbers: 2**n is too large for a float


def newcombe_paired(both: int, only_first: int, only_second: int, neither: int) -> tuple[float, float]:
    """95% interval of the second share minus the first, of paired answers.

    Method 10 of R. Newcombe, "Improved confidence intervals for the difference between binomial proportions based on
    paired data", Statistics in Medicine 17 (1998): the shares' Wilson intervals, joined by their correlation.
    """
    n = both + only_first + only_second + neither
    if n == 0:
        return -1.0, 1.0
    first, second = (both + only_first) / n, (both + only_second) / n
    (low_1, high_1), (low_2, high_2) = wilson_interval(both + only_first, n), wilson_interval(both + only_second, n)
    phi = _correlation(both, only_first, only_second, neither)
    below_1, above_1, below_2, above_2 = first - low_1, high_1 - first, second - low_2, high_2 - second
    down = math.sqrt(max(0.0, below_2**2 - 2 * phi * below_2 * above_1 + above_1**2))
    up = math.sqrt(max(0.0, above_2**2 - 2 * phi * above_2 * below_1 + below_1**2))
    return second - first - down, second - first + up


def bootstrap_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """95% interval of mean(second) - mean(first), by resampling pairs (percentiles); (-1, 1) for no pairs."""
    if not first:
        return -1.0, 1.0
    differences = np.array(second) - np.array(first)
    generator = np.random.default_rng(0)
    # One resample at a time: all at once would be problems x resamples values.
    means = [float(generator.choice(differences, len(differences)).mean()) for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    return float(low), float(high)


def _correlation(both: int, only_first: int, only_second: int, neither: int) -> float:
    """Newcombe's phi: of a positive one, a half is taken off the counts as a continuity correction."""
    n = both + only_first + only_second + neither
    product = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    if product == 0:
        return 0.0
    excess = float(both * neither - only_first * only_second)
    if excess > 0:
        excess = max(0.0, excess - n / 2)
    return excess / math.sqrt(product)
