"""All that learns in one stretch of memory: one norm, one clip, one optimizer step, whatever the number of layers."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class Flat:
    """Parameters moved into one buffer, with their gradients in another; both seen through the parameters as before.

    `groups` splits them by name into parts that stand together (the optimizer may treat each otherwise); `parameters`
    holds one flat `nn.Parameter` for each group. All must be of one dtype, on one device.
    """

    def __init__(self, groups: Sequence[Mapping[str, nn.Parameter]]) -> None:
        self.named = {name: parameter for group in groups for name, parameter in group.items()}
        total = sum(parameter.numel() for parameter in self.named.values())
        first = next(iter(self.named.values()))
        self.values = torch.empty(total, dtype=first.dtype, device=first.device)
        self.gradients = torch.zeros_like(self.values)
        self.parameters: list[nn.Parameter] = []
        begin = 0
        for group in groups:
            start = begin
            for parameter in group.values():
                end = begin + parameter.numel()
                place = self.values[begin:end].view(parameter.shape)
                place.copy_(parameter.detach())
                parameter.data = place
                parameter.grad = self.gradients[begin:end].view(parameter.shape)
                begin = end
            flat = nn.Parameter(self.values[start:begin])
            flat.grad = self.gradients[start:begin]
            self.parameters.append(flat)

    def clear(self) -> None:
        """Sets every gradient to zero, in place: the parameters keep their windows."""
        self.gradients.zero_()

    def clip(self, bound: float) -> Tensor:
        """Scales the gradients down to a norm of `bound` where it is larger; returns the norm."""
        norm: Tensor = torch.linalg.vector_norm(self.gradients)
        self.gradients.mul_(torch.clamp(bound / (norm + 1e-6), max=1.0))
        return norm

    def release(self) -> None:
        """Gives every parameter its own memory again, and no gradient."""
        for parameter in self.named.values():
            parameter.data = parameter.data.clone()
            parameter.grad = None
