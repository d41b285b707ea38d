"""One linear layer and its pair: `y = W x + bias + scale * b (a x)`, forward and backward by hand.

What it saves against the plain composition: no `(n, o)` temporary for the pair (it is added in place), no scaled copy,
no separate input gradient to add up, and for the backward only `x` (shared by all layers that read it) and the thin
`s = x a^T (n, r)`. Six thin products per step, the floor without merging: `s`, `s b^T`, `ds`, `db`, `da`, `ds a`.

In float32 on a CPU two of the six are saved by merging: `W + scale * b a` is made in the forward and again in the
backward (nothing of its size is kept), which is less work once `n (i + o) > 2 i o`. Not in half precision: rounding the
sum would lose most of a small delta.

Factors are masters, usually float32; they are cast to the dtype of `x` here, and their gradients are cast back. On a
CPU the rank is padded to a multiple of 16 with zeros, because narrower products run slower than wider ones there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_PAD = 16


def _ready(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both factors in the compute dtype; on a CPU padded in the rank."""
    r = a.shape[0]
    short = -r % _PAD if a.device.type == "cpu" else 0
    if short:
        return F.pad(a.to(dtype), (0, 0, 0, short)), F.pad(b.to(dtype), (0, short))
    return a.to(dtype), b.to(dtype)


def _pays_to_merge(x: Tensor, weight: Tensor) -> bool:
    o, i = weight.shape
    return x.dtype in (torch.float32, torch.float64) and x.device.type == "cpu" and x.shape[0] * (i + o) > 2 * i * o


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        wide_a, wide_b = _ready(a, b, x.dtype)
        s = x @ wide_a.T
        if _pays_to_merge(x, weight):
            y = F.linear(x, torch.addmm(weight, wide_b, wide_a, alpha=scale), bias)
        else:
            y = F.linear(x, weight, bias)
            y.addmm_(s, wide_b.T, alpha=scale)
        ctx.save_for_backward(x, s, weight, a, b)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, s, weight, a, b = ctx.saved_tensors
        scale: float = ctx.scale
        r = a.shape[0]
        dx = dweight = dbias = da = db = None
        wide_a, wide_b = _ready(a, b, x.dtype)
        ds = dy @ wide_b
        if ctx.needs_input_grad[4]:
            db = (dy.T @ s)[:, :r].to(b.dtype).mul_(scale)
        if ctx.needs_input_grad[3]:
            da = (ds.T @ x)[:r].to(a.dtype).mul_(scale)
        if ctx.needs_input_grad[0]:
            if _pays_to_merge(x, weight):
                dx = dy @ torch.addmm(weight, wide_b, wide_a, alpha=scale)
            else:
                dx = dy @ weight
                dx.addmm_(ds, wide_a, alpha=scale)
        if ctx.needs_input_grad[1]:
            dweight = dy.T @ x
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(0)
        return dx, dweight, dbias, da, db, None


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`F.linear(x, weight, bias) + scale * (x a^T) b^T` for `x (.., i)`, `weight (o, i)`, `a (r, i)`, `b (o, r)`.

    >>> import torch
    >>> x, w, a, b = torch.randn(5, 4), torch.randn(3, 4), torch.randn(2, 4), torch.randn(3, 2)
    >>> torch.allclose(lora_linear(x, w, None, a, b, 0.5), x @ (w + 0.5 * b @ a).T, atol=1e-5)
    True
    """
    flat = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, a, b)):
        y: Tensor = _LoraLinear.apply(flat, weight, bias, a, b, scale)  # type: ignore[no-untyped-call]
    else:
        y = F.linear(flat, weight, bias)
        y.addmm_(flat @ a.to(x.dtype).T, b.to(x.dtype).T, alpha=scale)
    return y.reshape(*x.shape[:-1], y.shape[-1])
