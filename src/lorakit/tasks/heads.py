"""A linear head on the trunk's vectors: a child of the trunk, so that the adapter's layer paths stay the base's."""

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import UsageError
from lorakit.trunk import dtype_of, place_of


class Aside(nn.Module):
    """Holds a head in an `nn.Sequential`, which runs all its children: what comes, goes on as it is."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Any) -> Any:
        return x


def give_head(
    model: nn.Module, name: str, n_outputs: int, noun: str = "labels", bias: Tensor | None = None, width: int = 0
) -> None:
    """Gives the trunk a head `name` on its vectors; one of the right size on both sides is left as it is.

    It begins at zero: every output equally probable, so nothing is known before training; or at `bias (n_outputs,)`.
    `width` is that of the vectors, if it is not the model's own. UsageError if the trunk has something else of that
    name: a part of its own, which it runs itself.
    """
    config: Any = getattr(model, "config", None)
    width = width or int(config.hidden_size)
    head = getattr(model, name, None)
    if isinstance(head, Aside):
        head = head.linear
    if isinstance(head, nn.Linear) and (head.in_features, head.out_features) == (width, n_outputs):
        return
    if head is not None:
        way = "pass the bare trunk (AutoModel)"
        if config is None:
            way = "wrap it, so that the head has a place of its own: nn.Sequential(model)"
        raise UsageError(
            f"this {type(model).__name__} has a '{name}' of its own, which is no head from {width} numbers to "
            f"{n_outputs} {noun}; {way}"
        )
    fresh = nn.Linear(width, n_outputs)
    with torch.no_grad():
        fresh.weight.zero_()
        fresh.bias.copy_(torch.zeros(n_outputs) if bias is None else bias)
    fresh.to(place_of(model), dtype_of(model))
    model.add_module(name, Aside(fresh) if isinstance(model, nn.Sequential) else fresh)


def run_head(model: nn.Module, name: str, vectors: Tensor) -> Tensor:
    """What the head gives: `vectors (examples, width)` -> `(examples, outputs)`."""
    head = model.get_submodule(name)
    found: Tensor = (head.linear if isinstance(head, Aside) else head)(vectors)  # type: ignore[operator]
    return found
