"""Products of all rows of one matrix with all rows of another, where both learn: scores of users with items."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.attach.kernels.products import input_gradient, linear


def all_pairs(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """`x (b, d)` times `y (c, d)` transposed, plus `bias (c,)`."""
    scores: Tensor = _AllPairs.apply(x, y, bias)  # type: ignore[no-untyped-call]
    return scores


class _AllPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return linear(x, y, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ds: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, y = ctx.saved_tensors
        needs_x, needs_y, needs_bias = ctx.needs_input_grad
        ds = ds.contiguous()
        dx = input_gradient(ds, y) if needs_x else None
        dy = linear(x.T.contiguous(), ds.T).T if needs_y else None  # so that oneDNN copies the smaller one
        return dx, dy, ds.sum(0) if needs_bias else None
