"""Frozen pieces of a block that look at each row by itself, in one reading each: GELU in its tanh form, RMS norm.

Models write both out of a dozen operations, each of which reads and writes the whole activation and keeps it for the
backward. Here the backward needs the input alone.
"""

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.kernels.native import library, place, takes

_LONG = ctypes.c_int64


def gelu_tanh(x: Tensor) -> Tensor:
    """`F.gelu(x, approximate="tanh")`."""
    if not takes(x):
        return F.gelu(x, approximate="tanh")
    y: Tensor = _Gelu.apply(x)  # type: ignore[no-untyped-call]
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last side, `weight (d,)` frozen, in float32."""
    if not takes(x):
        return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)
    y: Tensor = _Rms.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


def _gelu(x: Tensor, dy: Tensor | None) -> Tensor:
    y = torch.empty_like(x)
    library().gelu_rows(place(x), place(dy), place(y), _LONG(x.numel()), int(x.dtype == torch.bfloat16))  # type: ignore[union-attr]
    return y


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        return _gelu(x, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        return _gelu(ctx.saved_tensors[0], dy.contiguous())


def _rms(x: Tensor, dy: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    y = torch.empty_like(x)
    d = x.shape[-1]
    library().rms_rows(  # type: ignore[union-attr]
        *map(place, (x, dy, weight, y)),
        *map(_LONG, (x.numel() // d, d)),
        ctypes.c_float(eps),
        int(x.dtype == torch.bfloat16),
    )
    return y


class _Rms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _rms(x, None, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return _rms(x, dy.contiguous(), weight, ctx.eps), None, None
