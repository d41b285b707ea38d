"""linear: `nn.Linear` and its subclasses, weight `(o, i)`."""

import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.kinds import KINDS, Kind, Shapes, same_forward


@KINDS.add
class Linear(Kind):
    """`y = W x + bias`."""

    name = "linear"
    layers = "nn.Linear"
    fusable = True
    is_product = True

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and module.weight.is_floating_point() and module.weight.ndim == 2

    def plain(self, module: nn.Module) -> bool:
        return same_forward(module, nn.Linear.forward)

    def shapes(self, module: nn.Module, parameter: str) -> Shapes:
        o, i = module.out_features, module.in_features
        return Shapes((o, i), (o, i), has_bias=module._parameters.get("bias") is not None)  # type: ignore[arg-type]

    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight

    def stored(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight

    def inner(self, module: nn.Module, x: Tensor, a: Tensor) -> Tensor:
        return F.linear(x, a)

    def dense(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)
