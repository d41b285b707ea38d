"""How sure a metric is: 95 % intervals by the percentile bootstrap over rows (Efron, 1979)."""

from collections.abc import Callable
from typing import Any

import numpy as np

Statistic = Callable[[Any], Any]


def bootstrap(
    values: Any, statistic: Statistic | None = None, n_draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the mean of `values (rows,)`; or of `statistic(sums)` of the sums of `values (rows, k)`.

    `sums (draws, k)` are those of rows drawn with replacement, and a number for each draw comes back.
    """
    found = np.asarray(values, dtype=float)
    draws = np.random.default_rng(seed).integers(0, len(found), (n_draws, len(found)))
    sums = np.concatenate([found[chunk].sum(1) for chunk in np.array_split(draws, 20)])
    low, high = np.quantile(sums / len(found) if statistic is None else statistic(sums), [0.025, 0.975])
    return float(low), float(high)
