"""Rows of one matrix against all rows of another, where both learn: users with items, a softmax over the items.

The scores `(b, c)` are by far the largest thing of a step, so each is read and written as seldom as can be. On a CPU
in float32 our C function (native/pairs.c) holds those of a few rows at a time, and makes the gradients meanwhile.

Where rows are a frozen part and a low-rank one, `x = w + scale * s b^T`, no gradient of `x` is made: with
`ds = softmax - onehot` it would be `ds y`, and what is wanted of it are `ds y` times `scale b`, for s, and `ds y`
transposed times `scale s`, for b. These are `ds (scale y b)` and `scale y^T (ds^T s)`: products as narrow as the ranks
of both sides, in the place of two as wide as the rows.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.kernels.native import library
from lorakit.kernels.products import linear

_LANES = 16


class Rows(NamedTuple):
    """Rows `x = w + scale * s b^T`: `w (n, d)`, and, where they have a low-rank part, `s (n, r)` and `b (d, r)`."""

    w: Tensor
    s: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0

    def whole(self) -> Tensor:
        """All of it in one `(n, d)`."""
        return self.w if self.s is None or self.b is None else torch.addmm(self.w, self.s, self.b.T, alpha=self.scale)

    def to(self, dtype: torch.dtype) -> "Rows":
        """The same in this dtype."""
        s, b = (None if part is None else part.to(dtype) for part in (self.s, self.b))
        return Rows(self.w.to(dtype), s, b, self.scale)


def pair_loss(x: Rows, y: Rows, bias: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy in nats of `labels (b,)`, which of `y (c, d)` belongs to each of `x (b, d)`, by the scores
    `x y^T + bias`, `bias (c,)`. In float32 or wider.

    IndexError, on a CPU, if a label is none of `y`.
    """
    if labels.device.type == "cpu" and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(bias):
        raise IndexError(f"a label is outside 0 .. {len(bias) - 1}")
    dtype = torch.promote_types(bias.dtype, torch.float32)
    sides = [side.to(dtype) for side in (x, y)]
    thin = sum(side.s.shape[1] for side in sides if side.s is not None)
    if any(side.w.requires_grad for side in sides) or thin >= x.w.shape[1]:
        sides = [Rows(side.whole()) for side in sides]
    tensors = [tensor for side in sides for tensor in side[:3]]
    scales = [side.scale for side in sides]
    loss: Tensor = _PairLoss.apply(labels, scales, *tensors, bias.to(dtype))  # type: ignore[no-untyped-call]
    return loss


class _PairLoss(torch.autograd.Function):
    """The gradients are made in the forward, while the scores are there; the backward scales them.

    `right`, which ds is multiplied by, is what the gradient of x needs (y, y times the factor of x, or nothing), and
    the thin part of y; `left` likewise for ds transposed.
    """

    @staticmethod
    def forward(ctx: Any, labels: Tensor, scales: Sequence[float], *tensors: Any) -> Tensor:
        parts, bias = (tensors[:3], tensors[3:6]), tensors[6]
        sides = [Rows(*part)._replace(scale=scale) for part, scale in zip(parts, scales)]
        x, y = (side.whole() for side in sides)
        if not any(ctx.needs_input_grad):
            return _losses(x, y, bias, labels)[0].sum()
        needed = any(ctx.needs_input_grad[2:5]), any(ctx.needs_input_grad[5:8])
        wide = [_for_other(own, other, need) for own, other, need in zip((y, x), sides, needed)]
        right, left = (
            one if side.s is None else torch.cat([one, side.s], 1) for one, side in zip(wide, reversed(sides))
        )
        losses, dleft, dright, dbias = _losses(x, y, bias, labels, left, right)
        ctx.widths, ctx.scales = [one.shape[1] for one in wide], scales
        ctx.save_for_backward(x, y, dleft, dright, dbias, sides[0].b, sides[1].b)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, y, dleft, dright, dbias, b_x, b_y = ctx.saved_tensors
        of_x, of_y = ctx.widths
        grads = [
            *_gradients(dleft[:, :of_x], dright[:, of_y:], y, b_x, ctx.scales[0]),
            *_gradients(dright[:, :of_y], dleft[:, of_x:], x, b_y, ctx.scales[1]),
            dbias,
        ]
        needs = ctx.needs_input_grad[2:]
        return None, None, *(grad * dloss if need else None for grad, need in zip(grads, needs))  # type: ignore[operator]


def _for_other(own: Tensor, other: Rows, needed: bool) -> Tensor:
    """What the gradient of the other side needs of `own`."""
    if not needed:
        return own[:, :0]
    return own if other.b is None else linear(own, (other.b * other.scale).T)


def _gradients(thin: Tensor, met: Tensor, other: Tensor, b: Tensor | None, scale: float) -> tuple[Tensor | None, ...]:
    """Of w, s and b; of a side without a low-rank part `thin` is that of w."""
    return (thin, None, None) if b is None else (None, thin, (met.T @ other).T * scale)


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "y", "bias", "labels", "left", "right")),
        *((name, ctypes.c_void_p) for name in ("loss", "dleft", "dright", "dbias")),
        *((name, ctypes.c_int64) for name in ("rows", "c", "d", "n_left", "n_right")),
    ]


def _losses(
    x: Tensor, y: Tensor, bias: Tensor, labels: Tensor, left: Tensor | None = None, right: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Of every row `(b,)`; of ds, the gradient of their sum by the scores: `ds right`, `ds^T left`, sum over rows."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or library() is None:
        return _losses_by_torch(x, y, bias, labels, left, right)
    (b, d), c = x.shape, len(y)
    n = _LANES * (-(-c // _LANES) | 1)  # an odd number of lanes: the cache has room for all rows below each other
    given = [x, F.pad(y.T, (0, n - c)), F.pad(bias, (0, n - c), value=-torch.inf), labels.long()]
    made, widths = [x.new_empty(b)], [0, 0]
    if left is not None and right is not None:
        widths = [_LANES * -(-one.shape[1] // _LANES) for one in (left, right)]
        given += [F.pad(left, (0, widths[0] - left.shape[1])), F.pad(right, (0, widths[1] - right.shape[1], 0, n - c))]
        made += [x.new_empty(b, widths[1]), x.new_empty(n, widths[0]), x.new_empty(n)]
    given = [one.contiguous() for one in given]
    places = [one.data_ptr() for one in given] + [None] * (6 - len(given)) + [one.data_ptr() for one in made]
    call = _Call(*places, *[None] * (4 - len(made)), b, n, d, *widths)
    if library().pairs_loss(ctypes.byref(call)):  # type: ignore[union-attr]
        raise MemoryError(f"no memory for the scores of a few rows with {c}; take a smaller sample")
    if left is None or right is None:
        return (made[0],)
    losses, dleft, dright, dbias = made
    return losses, dleft[:, : right.shape[1]], dright[:c, : left.shape[1]], dbias[:c]


def _losses_by_torch(
    x: Tensor, y: Tensor, bias: Tensor, labels: Tensor, left: Tensor | None, right: Tensor | None
) -> tuple[Tensor, ...]:
    scores, own = linear(x, y, bias), labels[:, None]
    shift = scores.logsumexp(1, keepdim=True)
    losses = (shift - scores.gather(1, own))[:, 0]
    if left is None or right is None:
        return (losses,)
    ds = scores.sub_(shift).exp_()
    ds.scatter_add_(1, own, torch.full_like(shift, -1.0))
    return losses, ds @ right, ds.T @ left, ds.sum(0)
