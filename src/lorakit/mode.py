"""Eval mode for as long as it is needed: no dropout, and batch norms keep their statistics."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within the block no module trains; those that did before, and no others, do so again behind it."""
    modes = [module for module in model.modules() if module.training]
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module in modes:
            module.training = True
