"""Linear layers of other libraries with quantized weights: what they have in common. One file for each library.

Each says how its weight is read as floats and how a changed one is written back. Products with an adapter are ours,
with the weight made anew each time; without one the layer runs by itself. Libraries are imported where they are met.
"""

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.kernels.products import Coded
from lorakit.kinds import Kind, Shapes


class ForeignLinear(Kind):
    """`y = W x + bias`, W kept by another library."""

    family = "linear"
    specific = 1
    fusable = True
    is_product = True
    rounds = True

    @abstractmethod
    def read(self, module: Any) -> Any:
        """`W (o, i)` as floats, without a gradient."""

    def matches(self, module: nn.Module) -> bool:
        return type(module).__module__.partition(".")[0] == self.library and self.is_layer(module)

    def is_layer(self, module: nn.Module) -> bool:
        """Is this module, whose class comes from the library, such a layer?"""
        return True

    def shapes(self, module: Any, parameter: str) -> Shapes:
        o, i = module.out_features, module.in_features
        has_bias = getattr(module, "bias", None) is not None
        return Shapes((o, i), (o, i), has_bias=has_bias)

    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        found: Tensor = self.read(module)
        return found

    def operand(self, module: Any, weight: Tensor) -> Tensor | Coded:
        return Coded((module.out_features, module.in_features), lambda dtype: self.read(module).to(dtype))

    def stored(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight

    def numbers(self, module: nn.Module, weight: Tensor) -> Tensor:
        return self.canonical(module, weight)

    def tensors(self, module: nn.Module, parameter: str) -> dict[str, Tensor]:
        return {}  # theirs alone

    @abstractmethod
    def write(self, module: Any, parameter: str, weight: Tensor) -> None:
        """Quantizes `W (o, i)` as the layer's own was."""

    def inner(self, module: nn.Module, x: Tensor, a: Tensor) -> Tensor:
        return F.linear(x, a)

    def dense(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)


def frozen(weight: Tensor) -> nn.Parameter:
    """A parameter that does not learn."""
    return nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)
