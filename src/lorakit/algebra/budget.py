"""One budget over all layers: which ranks lose least.

Every layer offers directions in the order of what they are worth, at a cost each. Taking them by worth for cost is
optimal where costs divide the budget, and else but for the last direction (Dantzig, 1957: the knapsack with fractions).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Offer(NamedTuple):
    """Of one layer: `worth (k,)` of each direction, falling; numbers that a direction takes; the fewest that stay."""

    worth: Tensor
    cost: int
    least: int = 0


def within_size(offers: Mapping[str, Offer], size: int) -> dict[str, int]:
    """The ranks that are worth most with at most `size` numbers, beside those that every layer keeps anyway."""
    left = size - sum(offer.least * offer.cost for offer in offers.values())
    ranks = {path: offer.least for path, offer in offers.items()}
    full: set[str] = set()  # layers whose next direction did not fit any more
    for path, _, cost in _by_price(offers):
        if path not in full and cost <= left:
            ranks[path] += 1
            left -= cost
        else:
            full.add(path)
    return ranks


def within_loss(offers: Mapping[str, Offer], loss: float) -> dict[str, int]:
    """The smallest ranks that leave out no more than `loss` of all worth together."""
    ranks = {path: len(offer.worth) for path, offer in offers.items()}
    left = loss
    full: set[str] = set()
    for path, worth, _ in reversed(_by_price(offers)):
        if path not in full and worth <= left:
            ranks[path] -= 1
            left -= worth
        else:
            full.add(path)
    return ranks


def _by_price(offers: Mapping[str, Offer]) -> list[tuple[str, float, int]]:
    """Layer, worth and cost of every direction that may go, the best first; each layer's in their own order."""
    found = []
    for path, offer in offers.items():
        values = torch.cummin(offer.worth.double(), 0).values.tolist() if len(offer.worth) else []
        found += [(path, worth, offer.cost, k) for k, worth in enumerate(values) if k >= offer.least]
    found.sort(key=lambda one: (-one[1] / one[2], one[3]))
    return [(path, worth, cost) for path, worth, cost, _ in found]
