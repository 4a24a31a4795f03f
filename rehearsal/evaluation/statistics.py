"""How sure a measured success rate is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def wilson_interval(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The score interval of a proportion (Wilson, 1927), 95% by default; (0, 1) for no trials.

    It stays inside [0, 1] and is honest at 0 and n successes, where the usual formula has width zero.
    """
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At the ends the formula gives 0 and 1 up to rounding, which may fall on the wrong side.
    return 0.0 if successes == 0 else max(0.0, centre - half), 1.0 if successes == n else min(1.0, centre + half)


def mean_interval(values: Sequence[float], seed: int = 0, resamples: int = 10_000) -> tuple[float, float, float]:
    """Mean with its 95% bootstrap interval (percentile), for a handful of seeds or many episodes.

    Returns:
        mean, low, high; all NaN for no values, and low = high = mean for one.
    """
    array = np.asarray(values, dtype=np.float64)
    if len(array) == 0:
        return math.nan, math.nan, math.nan
    rng = np.random.default_rng(seed)
    means = array[rng.integers(0, len(array), (resamples, len(array)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(array.mean()), float(low), float(high)
