"""Layers with weights in few bits: what linear ones have in common, and our own (quant/).

An adapter takes them for the layers that they stand for (`family`). Their codes cannot be a view of W, so `canonical`
makes it anew, and what is written is rounded. Products with an adapter are ours, with the weight made for one product
and let go; without an adapter the layer runs by itself. Those of other libraries are a file each, and import their
library where they meet it.
"""

from abc import abstractmethod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.kernels.products import Coded
from lorakit.kinds import KINDS, Kind, Shapes, same_forward
from lorakit.kinds.embedding import Embedding
from lorakit.quant.layers import QuantEmbedding, Quantized, QuantLinear


class CodedLinear(Kind):
    """`y = W x + bias`, W in codes; of the `library` whose package the module's class comes from."""

    family = "linear"
    specific = 1
    fusable = True
    is_product = True
    rounds = True

    @abstractmethod
    def read(self, module: Any) -> Any:
        """`W (o, i)` as floats, without a gradient."""

    @abstractmethod
    def write(self, module: Any, parameter: str, weight: Tensor) -> None:
        """Quantizes `W (o, i)` as the layer's own was."""

    def matches(self, module: nn.Module) -> bool:
        return type(module).__module__.partition(".")[0] == self.library and self.is_layer(module)

    def is_layer(self, module: nn.Module) -> bool:
        """Is this module, whose class comes from the library, such a layer?"""
        return True

    def shapes(self, module: Any, parameter: str) -> Shapes:
        o, i = module.out_features, module.in_features
        return Shapes((o, i), (o, i), has_bias=getattr(module, "bias", None) is not None)

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
        return {}  # more than we know of

    def inner(self, module: nn.Module, x: Tensor, a: Tensor) -> Tensor:
        return F.linear(x, a)

    def dense(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)


def frozen(weight: Tensor) -> nn.Parameter:
    """A parameter that does not learn."""
    return nn.Parameter(weight.detach().clone(), requires_grad=False)


def _held(module: nn.Module) -> Quantized:
    assert isinstance(module, Quantized)
    return module


@KINDS.add
class QuantizedLinear(CodedLinear):
    """`y = W x + bias`, W in one of our formats."""

    name = "quantized_linear"
    layers = "lorakit's QuantLinear (int8, nf4, int4)"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, QuantLinear)

    def plain(self, module: nn.Module) -> bool:
        return same_forward(module, QuantLinear.forward)

    def read(self, module: Any) -> Any:
        return module.read(module.like.dtype)

    def write(self, module: Any, parameter: str, weight: Tensor) -> None:
        module.write(weight)

    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight if weight.is_floating_point() else super().canonical(module, weight)  # a stand-in is floats

    def operand(self, module: Any, weight: Tensor) -> Tensor | Coded:
        return weight if weight.is_floating_point() else module.coded()

    def numbers(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight

    def original(self, module: nn.Module) -> Tensor | None:
        return _held(module).original

    def tensors(self, module: nn.Module, parameter: str) -> dict[str, Tensor]:
        return {"weight": _held(module).codes, "scales": _held(module).scales}


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
