"""embedding: `nn.Embedding`, weight `(n, d)`; canonical `W (d, n)`, so that a look-up is `W` times a one-hot vector."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.kinds import KINDS, Kind, Shapes, same_forward, weight_of
from lorakit.update import Update


@KINDS.add
class Embedding(Kind):
    """`y = weight[x]`."""

    name = "embedding"
    layers = "nn.Embedding"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding) and module.weight.is_floating_point()

    def plain(self, module: nn.Module) -> bool:
        return same_forward(module, nn.Embedding.forward) and module.max_norm is None

    def shapes(self, module: nn.Module, parameter: str) -> Shapes:
        n, d = weight_of(module).shape
        return Shapes((n, d), (d, n))

    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight.mT

    def stored(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight.mT

    def inner(self, module: nn.Module, x: Tensor, a: Tensor) -> Tensor:
        return F.embedding(x, a.mT)

    def dense(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(x, weight.mT)

    def apply(self, module: nn.Module, x: Tensor, y: Tensor, update: Update) -> Tensor:
        changed = super().apply(module, x, y, update)
        padding: int | None = module.padding_idx  # type: ignore[assignment]
        if padding is None or not changed.requires_grad:
            return changed
        silent = torch.eq(x, padding).unsqueeze(-1)  # torch's rule: padding is looked up and teaches nothing
        return torch.where(silent, changed.detach(), changed)

    def over_inputs(self, vector: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError("an embedding has no input channels to scale")
