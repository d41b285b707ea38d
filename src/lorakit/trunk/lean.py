"""Frozen layers that cost less for a while: products with a packed weight, activations and norms in one reading.

The layer's forward is replaced on the instance, as under the fused drive, and given back. What learns is left alone.
Which activation or norm a module is, its own answers say: it is replaced if ours gives the same on random numbers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.kernels.products import Packed, frozen_linear, pack
from lorakit.kernels.rows import gelu_tanh, rms_norm
from lorakit.kinds import Kind, kind_of

Run = Callable[[Tensor], Tensor]
_CLOSE = 1e-5  # float32, numbers of size 1 to 10


class Lean:
    """The frozen layers of a model, run our way until `release`; all but those in its child `head`.

    With `packs` their weights are kept a second time, in oneDNN's order, where that helps.
    """

    def __init__(self, model: nn.Module, head: str = "", packs: bool = True) -> None:
        self._changed: list[nn.Module] = []
        for path, module in model.named_modules():
            if module._modules or "forward" in module.__dict__ or (head and path.split(".")[0] == head):
                continue  # a container, adapted, or trained
            run = _products_of(module, packs) or _rows_of(module)
            if run is not None:
                module.__dict__["forward"] = partial(_forward, module, run)
                self._changed.append(module)

    def release(self) -> None:
        """Puts the layers back."""
        for module in self._changed:
            module.__dict__.pop("forward", None)


def _forward(module: nn.Module, run: Run, *args: Any, **kwargs: Any) -> Any:
    learns = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in module._parameters.values())
    if (
        learns
        or len(args) != 1
        or kwargs
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled(args[0].device.type)
    ):
        return type(module).forward(module, *args, **kwargs)
    return run(args[0])


def _products_of(module: nn.Module, packs: bool) -> Run | None:
    kind = kind_of(module)
    if kind is None or not kind.is_product or kind.rounds or not kind.plain(module):
        return None
    packed = pack(kind.canonical(module, module.weight)) if packs else None  # type: ignore[arg-type]
    return partial(_product, module, kind, packed)


def _product(module: nn.Module, kind: Kind, packed: Packed | None, x: Tensor) -> Tensor:
    return frozen_linear(x, kind.canonical(module, module.weight), module.bias, packed)  # type: ignore[arg-type]


@torch.no_grad()
def _rows_of(module: nn.Module) -> Run | None:
    """Our form of an activation without parameters or of a norm with one vector, if it is the same."""
    if isinstance(module, nn.Dropout | nn.Identity | nn.GELU | nn.SiLU | nn.ReLU | nn.Tanh) or module._buffers:
        return None  # one operation of torch, or none
    parameters = [p for p in module._parameters.values() if p is not None]
    if not parameters:
        return gelu_tanh if _same(module, gelu_tanh, 48) else None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if len(parameters) != 1 or parameters[0].ndim != 1 or not isinstance(eps, float):
        return None
    weight = parameters[0].detach().float()
    for scale in (weight, weight + 1):  # Gemma keeps its weight less one
        run = partial(rms_norm, weight=scale, eps=eps)
        if _same(module, run, len(weight)):
            return run
    return None


def _same(module: nn.Module, run: Run, width: int) -> bool:
    """The module and our function answer alike."""
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0)) * 3
    own = next(module.parameters(), x)
    x, dtype = x.to(own.device), own.dtype
    try:
        mine = module(x.to(dtype))
    except Exception:  # whatever it is, it wants something else
        return False
    if not isinstance(mine, Tensor) or mine.shape != x.shape:
        return False
    bound = _CLOSE if dtype == torch.float32 else 0.02
    return float((mine.float() - run(x.to(dtype)).float()).abs().max()) <= bound * float(mine.float().abs().max())
