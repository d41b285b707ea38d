"""Our own layers with quantized weights (quant/): an adapter takes them for the layers that they stand for.

Their codes cannot be a view of W, so `canonical` makes it anew, and what is written is rounded.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.kernels.products import Coded
from lorakit.kinds import KINDS, Kind, Shapes, same_forward
from lorakit.kinds.embedding import Embedding
from lorakit.quant.layers import QuantEmbedding, Quantized, QuantLinear


def _held(module: nn.Module) -> Quantized:
    assert isinstance(module, Quantized)
    return module


@KINDS.add
class QuantizedLinear(Kind):
    """`y = W x + bias`, W in codes."""

    name = "quantized_linear"
    layers = "lorakit's QuantLinear (int8, nf4, int4)"
    family = "linear"
    fusable = True
    is_product = True
    rounds = True

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, QuantLinear)

    def plain(self, module: nn.Module) -> bool:
        return same_forward(module, QuantLinear.forward)

    def shapes(self, module: nn.Module, parameter: str) -> Shapes:
        held = _held(module)
        return Shapes((held.o, held.i), (held.o, held.i), has_bias=module._parameters.get("bias") is not None)

    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight if weight.is_floating_point() else _held(module).read(_held(module).like.dtype)

    def operand(self, module: nn.Module, weight: Tensor) -> Tensor | Coded:
        return weight if weight.is_floating_point() else module.coded()  # type: ignore[operator,no-any-return]

    def stored(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight

    def original(self, module: nn.Module) -> Tensor | None:
        return _held(module).original

    def tensors(self, module: nn.Module, parameter: str) -> dict[str, Tensor]:
        return {"weight": _held(module).codes, "scales": _held(module).scales}

    def write(self, module: nn.Module, parameter: str, weight: Tensor) -> None:
        _held(module).write(weight)

    def inner(self, module: nn.Module, x: Tensor, a: Tensor) -> Tensor:
        return F.linear(x, a)

    def dense(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)


@KINDS.add
class QuantizedEmbedding(Embedding):
    """`y = W[x]`, the rows in codes."""

    name = "quantized_embedding"
    layers = "lorakit's QuantEmbedding (int8, nf4, int4)"
    family = "embedding"
    rounds = True

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, QuantEmbedding)

    def plain(self, module: nn.Module) -> bool:
        return same_forward(module, QuantEmbedding.forward)

    def shapes(self, module: nn.Module, parameter: str) -> Shapes:
        held = _held(module)
        return Shapes((held.o, held.i), (held.i, held.o))

    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        return (weight if weight.is_floating_point() else _held(module).read(_held(module).like.dtype)).mT

    def tensors(self, module: nn.Module, parameter: str) -> dict[str, Tensor]:
        return {"weight": _held(module).codes, "scales": _held(module).scales}

    def write(self, module: nn.Module, parameter: str, weight: Tensor) -> None:
        _held(module).write(weight.mT)
