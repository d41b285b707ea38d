"""Frozen layers that cost less for a while: products with a weight kept in the library's own order.

The layer's forward is replaced on the instance, as under the fused drive, and given back. What learns is left alone.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.kernels.products import Packed, frozen_linear, pack
from lorakit.kinds import Kind, kind_of


class Lean:
    """The frozen linear layers of a model, run by our products until `release`."""

    def __init__(self, model: nn.Module) -> None:
        self._changed: list[nn.Module] = []
        for module in model.modules():
            kind = kind_of(module)
            if kind is None or not kind.fusable or not kind.plain(module) or "forward" in module.__dict__:
                continue
            if module._modules:
                continue  # adapted or trained
            weight = kind.canonical(module, module.weight)  # type: ignore[arg-type]
            module.__dict__["forward"] = partial(_forward, module, kind, pack(weight))
            self._changed.append(module)

    def release(self) -> None:
        """Puts the layers back."""
        for module in self._changed:
            module.__dict__.pop("forward", None)


def _forward(module: nn.Module, kind: Kind, packed: Packed | None, *args: Any, **kwargs: Any) -> Tensor:
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    learns = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in module._parameters.values())
    if learns or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    return frozen_linear(x, kind.canonical(module, module.weight), module.bias, packed)  # type: ignore[arg-type]
