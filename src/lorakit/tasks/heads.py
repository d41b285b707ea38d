"""A linear head on hidden states: a child of the trunk, so that the layer paths of an adapter are those of the base."""

import torch
from torch import Tensor, nn

from lorakit.errors import UsageError


def give_head(model: nn.Module, name: str, n_outputs: int, noun: str = "labels", bias: Tensor | None = None) -> None:
    """Gives the trunk a head `name`; one of the right size is left as it is. UsageError if it has another.

    It begins at zero: every output equally probable, so nothing is known before training; or at `bias (n_outputs,)`.
    """
    head = getattr(model, name, None)
    if isinstance(head, nn.Linear) and head.out_features == n_outputs:
        return
    if head is not None:
        raise UsageError(
            f"this {type(model).__name__} has a '{name}' of its own that does not give {n_outputs} {noun}; "
            "pass the bare trunk (AutoModel)"
        )
    fresh = nn.Linear(int(model.config.hidden_size), n_outputs)  # type: ignore[union-attr,arg-type]
    with torch.no_grad():
        fresh.weight.zero_()
        fresh.bias.copy_(torch.zeros(n_outputs) if bias is None else bias)
    parameter = next(model.parameters())
    model.add_module(name, fresh.to(parameter.device, parameter.dtype))
