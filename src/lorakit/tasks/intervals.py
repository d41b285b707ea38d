"""How sure a metric is: 95 % intervals by the percentile bootstrap over rows (Efron, 1979; Koehn, 2004, for BLEU)."""

from collections.abc import Callable
from typing import Any

import numpy as np

Statistic = Callable[[Any], Any]

_DRAWS, _AT_ONCE = 2000, 100


def interval(n: int, statistic: Statistic) -> tuple[float, float]:
    """Of a statistic of `n` rows: from places of rows `(draws, n)`, drawn with replacement, it makes `(draws,)`."""
    generator = np.random.default_rng(0)
    found = [statistic(generator.integers(0, n, (_AT_ONCE, n))) for _ in range(_DRAWS // _AT_ONCE)]
    low, high = np.quantile(np.concatenate(found), [0.025, 0.975])
    return float(low), float(high)


def bootstrap(values: Any, statistic: Statistic | None = None) -> tuple[float, float]:
    """Of the mean of `values (rows,)`; or of `statistic(sums)` of the sums `(draws, k)` of `values (rows, k)`."""
    given = np.asarray(values, dtype=float)
    if statistic is None:
        return interval(len(given), lambda draws: given[draws].mean(1))
    return interval(len(given), lambda draws: statistic(given[draws].sum(1)))
