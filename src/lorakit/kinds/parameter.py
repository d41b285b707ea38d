"""parameter: a bare matrix, or a stack of them, that its module reads by itself instead of calling a layer.

`nn.MultiheadAttention.in_proj_weight`, the weights of `nn.LSTM` and `nn.GRU`, the fused experts of mixture-of-experts
models. `(o, i)` or `(e, o, i)`; `(e, i, o)` where the module says `is_transposed`, as Transformers does. Only the
weight drive can change them, so there is nothing to apply here.
"""

from torch import Tensor, nn

from lorakit.errors import AttachError
from lorakit.kinds import KINDS, Kind, Shapes


@KINDS.add
class Parameter(Kind):
    """A weight without a layer of its own."""

    name = "parameter"
    layers = "nn.MultiheadAttention, nn.LSTM, nn.GRU, 3-D expert weights, any bare matrix"

    def matches(self, module: nn.Module) -> bool:
        return False  # found by name, never by module: see describe.py

    def plain(self, module: nn.Module) -> bool:
        return False

    def shapes(self, module: nn.Module, parameter: str) -> Shapes:
        weight = module._parameters[parameter]
        assert weight is not None
        *batch, o, i = self.canonical(module, weight).shape
        return Shapes(tuple(weight.shape), (o, i), tuple(batch), has_bias=bias_name(module, parameter) != "")

    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight.mT if weight.ndim == 3 and getattr(module, "is_transposed", False) else weight

    def stored(self, module: nn.Module, weight: Tensor) -> Tensor:
        return self.canonical(module, weight)

    def inner(self, module: nn.Module, x: Tensor, a: Tensor) -> Tensor:
        raise AttachError("a bare parameter has no call of its own; it takes the weight drive")

    def dense(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        raise AttachError("a bare parameter has no call of its own; it takes the weight drive")


def bias_name(module: nn.Module, weight_name: str) -> str:
    """Name of the bias that goes with a weight of this module; '' if it has none."""
    for name in (weight_name.replace("weight", "bias"), f"{weight_name}_bias"):
        if name != weight_name and module._parameters.get(name) is not None:
            return name
    return ""
