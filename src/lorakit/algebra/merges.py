"""How several matrices become one, number by number: the rules of TIES, DARE and magnitude pruning.

Each takes a stack `(k, .., m, n)` and a weight for each. They are written for whole deltas; on the matrices that deltas
are between common bases (`combine`) they cost little, and mean the same but for the choice of basis.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.errors import UsageError, nearest


class How(NamedTuple):
    """What a rule goes by: `density`, the share of numbers that are kept (0..1); `sign`, by what the sign of a number
    is elected, "total" (their sum) or "frequency" (how many); `generator`, for what is random."""

    density: float
    sign: str
    generator: torch.Generator


Rule = Callable[[Tensor, Tensor, How], Tensor]


def trimmed(stack: Tensor, density: float) -> Tensor:
    """Of each matrix the share `density` of its numbers that are largest, the others 0."""
    flat = stack.flatten(1).abs()
    n_kept = max(1, int(density * flat.shape[1]))
    places = flat.topk(n_kept, sorted=False).indices
    mask = torch.zeros_like(flat).scatter_(1, places, 1.0)
    return stack * mask.view_as(stack)


def dropped(stack: Tensor, how: How) -> Tensor:
    """Each number is kept with probability `density` and then divided by it (Yu et al., 2024, arXiv 2311.03099)."""
    drawn = torch.rand(stack.shape, generator=how.generator, dtype=stack.dtype).to(stack.device)
    return stack * (drawn < how.density) / how.density


def elected(stack: Tensor, weights: Tensor, how: How) -> Tensor:
    """The mean of those weighted numbers whose sign is the elected one (Yadav et al., 2023, arXiv 2306.01708).

    All vote alike, whatever their weights are; one with a negative weight votes against what it takes away.
    """
    turned = _weighted(stack, weights.sign())
    votes = turned.sum(0) if how.sign == "total" else turned.sign().sum(0)
    agree = turned.sign() == torch.where(votes >= 0, 1.0, -1.0)
    return (_weighted(stack, weights) * agree).sum(0) / agree.sum(0).clamp(min=1)


def _weighted(stack: Tensor, weights: Tensor) -> Tensor:
    return stack * weights.to(stack).view(-1, *[1] * (stack.ndim - 1))


def linear(stack: Tensor, weights: Tensor, how: How) -> Tensor:
    """The weighted sum."""
    return _weighted(stack, weights).sum(0)


def ties(stack: Tensor, weights: Tensor, how: How) -> Tensor:
    """Trim, elect signs, take the mean of those that agree."""
    return elected(trimmed(stack, how.density), weights, how)


def dare_linear(stack: Tensor, weights: Tensor, how: How) -> Tensor:
    """Drop and rescale, then the weighted sum."""
    return linear(dropped(stack, how), weights, how)


def dare_ties(stack: Tensor, weights: Tensor, how: How) -> Tensor:
    """Drop and rescale, then elect signs."""
    return elected(dropped(stack, how), weights, how)


def magnitude_prune(stack: Tensor, weights: Tensor, how: How) -> Tensor:
    """Trim, then the weighted sum."""
    return linear(trimmed(stack, how.density), weights, how)


RULES: dict[str, Rule] = {
    "linear": linear,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "magnitude_prune": magnitude_prune,
}
_SAME = {"cat": "linear", "svd": "linear_svd"}  # other names that PEFT has for them


def rule_of(name: str) -> tuple[str, bool]:
    """The name of a rule, and whether it works on whole deltas ("_svd"), of any of PEFT's eleven names or ours."""
    found = _SAME.get(name, name)
    plain = found.removesuffix("_svd")
    if plain not in RULES:
        known = [*RULES, *_SAME, *(f"{rule}_svd" for rule in RULES if rule != "linear")]
        raise UsageError(f"there is no way '{name}' to combine{nearest(name, known)}; use one of {', '.join(known)}")
    return plain, found.endswith("_svd")


def check_how(density: float, sign: str) -> None:
    """UsageError for what no rule can go by."""
    if not 0 < density <= 1:
        raise UsageError(f"density is {density}; it is a share of numbers, above 0 and at most 1")
    if sign not in ("total", "frequency"):
        raise UsageError(f"sign is elected by '{sign}'{nearest(sign, ['total', 'frequency'])}; use total or frequency")
