"""Matrix products with a frozen weight, by the faster of the libraries that torch brings.

In float32 torch takes MKL on x86, which on AMD processors runs at less than half of what oneDNN reaches there; both
compute in float32. In bfloat16 torch takes oneDNN by itself, which first brings the weight into an order of its own,
at every call: a weight that does not change is brought there once (`pack`). Measured in benchmarks/products.py.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_SMALLEST = 64 * 64  # numbers in a weight below which packing gains nothing


class Coded(NamedTuple):
    """A frozen weight `W (o, i)` kept in another form: made a tensor for one product, and let go."""

    shape: tuple[int, int]
    read: Callable[[torch.dtype], Tensor]
    requires_grad: bool = False


class Packed(NamedTuple):
    """One weight `W (o, i)` in oneDNN's order: for `x W^T`, and for `dy W`."""

    forward: Tensor
    backward: Tensor


def pack(weight: Tensor | Coded) -> Packed | None:
    """The weight in oneDNN's order, twice; None where that does not help."""
    if (
        not isinstance(weight, Tensor)
        or weight.device.type != "cpu"
        or weight.dtype != torch.bfloat16
        or weight.numel() < _SMALLEST
        or not torch._C._has_mkldnn
    ):
        return None
    weight = weight.detach()
    order = torch.ops.mkldnn._reorder_linear_weight
    return Packed(order(weight.contiguous()), order(weight.T.contiguous()))


@cache
def _onednn_is_faster() -> bool:
    """True on AMD processors with AVX-512, if oneDNN is there. Fixed by the processor, so that runs can be repeated."""
    if not torch._C._has_mkldnn or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            return any(line.startswith("vendor_id") and "AMD" in line for line in stream)
    except OSError:
        return False


def _by_onednn(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.shape[0] > 0 and _onednn_is_faster()


def dense(weight: Tensor | Coded, dtype: torch.dtype) -> Tensor:
    """The weight as a tensor; what is one already stays as it is."""
    return weight if isinstance(weight, Tensor) else weight.read(dtype)


def linear(x: Tensor, weight: Tensor | Coded, bias: Tensor | None = None, packed: Packed | None = None) -> Tensor:
    """`x (n, i)` times `weight (o, i)` transposed, plus `bias (o,)`. No gradient."""
    weight = dense(weight, x.dtype)
    if packed is not None or _by_onednn(x):
        right = weight if packed is None else packed.forward
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, right, bias, "none", [], "")
        return y
    return F.linear(x, weight, bias)


def input_gradient(
    dy: Tensor, weight: Tensor | Coded, packed: Packed | None = None, onto: Tensor | None = None
) -> Tensor:
    """`dy (n, o)` times `weight (o, i)`, plus `onto (n, i)`, which may be written over. No gradient."""
    weight = dense(weight, dy.dtype)
    if packed is not None or _by_onednn(dy):
        right = weight.T if packed is None else packed.backward
        if onto is None:
            dx: Tensor = torch.ops.mkldnn._linear_pointwise(dy, right, None, "none", [], "")
        else:
            dx = torch.ops.mkldnn._linear_pointwise.binary(dy, onto, right, None, "add")
        return dx
    return dy @ weight if onto is None else onto.addmm_(dy, weight)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | Coded, bias: Tensor | None, packed: Packed | None) -> Tensor:
        ctx.right = weight, packed
        return linear(x, weight, bias, packed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return input_gradient(dy, *ctx.right), None, None, None


def frozen_linear(x: Tensor, weight: Tensor | Coded, bias: Tensor | None, packed: Packed | None) -> Tensor:
    """`F.linear(x, weight, bias)` for `x (.., i)` and a weight that does not learn."""
    y: Tensor = _FrozenLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias, packed)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], y.shape[-1])
