"""hf_conv1d: GPT-2's `transformers.pytorch_utils.Conv1D`, a linear layer with its weight stored as `(i, o)`.

Recognised by its class name and shape, so that Transformers need not be imported.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.kinds import KINDS, Kind, Shapes, weight_of


@KINDS.add
class HfConv1d(Kind):
    """`y = weight.T x + bias`."""

    name = "hf_conv1d"
    layers = "transformers Conv1D (GPT-2)"
    fusable = True
    is_product = True

    def matches(self, module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and weight is not None and weight.ndim == 2

    def shapes(self, module: nn.Module, parameter: str) -> Shapes:
        i, o = weight_of(module).shape
        return Shapes((i, o), (o, i), has_bias=True)

    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight.mT

    def stored(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight.mT

    def inner(self, module: nn.Module, x: Tensor, a: Tensor) -> Tensor:
        return F.linear(x, a)

    def dense(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)
