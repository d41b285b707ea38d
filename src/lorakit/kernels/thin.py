"""The low-rank side of layers that read one input: products whose one side is the rank, all of a group at once.

In bfloat16 by our C functions (native/thin.c) where the processor can: one pass over each matrix, while torch takes one
for each product and first brings the wide side into another order. Else by torch, which is faster from rank 64 on. On a
GPU the backward is in Triton (triton_pairs.py), where it is installed.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.device import has_triton
from lorakit.kernels.gains import add_gain, plain
from lorakit.kernels.native import library
from lorakit.kernels.products import linear

Into = tuple[Tensor | None, Tensor | None]  # where gradients of a (rank, i) and b (o, rank) are added; None: not wanted
RANK, WIDTH = 8, 32  # what the C functions divide ranks and widths by
WIDEST = 32  # rank up to which they are faster


class _Part(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("b", "y", "da", "db", "gain", "bias")),
        *((name, ctypes.c_int64) for name in ("y_row", "o", "r", "rank")),
        ("scale", ctypes.c_float),
    ]


@cache
def _functions() -> tuple[Any, Any, Any] | None:
    """Forward, backward, and lengths of rows, or None where they cannot run."""
    native = library()
    if native is None or not native.thin_known():
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    native.thin_forward.argtypes = [pointer, number, pointer, number, pointer, pointer, number, number]
    native.thin_backward.argtypes = [pointer, number, pointer, number, *[pointer] * 3, number, number, number]
    native.thin_lengths.argtypes = [*[pointer] * 5, ctypes.c_float, pointer, *[number] * 4]
    return native.thin_forward, native.thin_backward, native.thin_lengths


def _ours(x: Tensor | None, a: Tensor, b: Sequence[Tensor], ys: Sequence[Tensor]) -> bool:
    read = ys if x is None else (x, *ys)
    return (
        a.dtype == torch.bfloat16
        and a.device.type == "cpu"
        and all(len(m) > 0 for m in read)
        and _functions() is not None
        and a.shape[1] % WIDTH == 0
        and a.is_contiguous()
        and all(
            w.is_contiguous() and w.shape[0] % RANK == 0 and 0 < w.shape[0] <= WIDEST and w.shape[1] % WIDTH == 0
            for w in b
        )
        and all(m.dtype == torch.bfloat16 and m.stride(1) == 1 for m in read)
    )


def _parts(
    b: Sequence[Tensor],
    ys: Sequence[Tensor],
    into: Sequence[Into],
    scales: Sequence[float],
    gains: Sequence[tuple[Tensor | None, Tensor | None]],
) -> Any:
    entries = []
    for w, y, (da, db), scale, gain in zip(b, ys, into, scales, gains):
        r, o = w.shape
        rank = da.shape[0] if da is not None else db.shape[1] if db is not None else r
        places = (0 if t is None else t.data_ptr() for t in (da, db, *gain))
        entries.append(_Part(w.data_ptr(), y.data_ptr(), *places, y.stride(0), o, r, rank, scale))
    return (_Part * len(entries))(*entries)


def check(failed: int) -> None:
    """MemoryError if one of our functions found none."""
    if failed:
        raise MemoryError("no memory for the factors of one group of layers")


def lengths(weight: Tensor, b: Tensor, a: Tensor, scale: float, squares: Tensor) -> Tensor | None:
    """The length of every row of `weight + scale b a` (norms.py); None where the C function does not take them."""
    if weight.dtype != torch.bfloat16 or weight.ndim != 2 or any(t.dtype != torch.float32 for t in (a, b, squares)):
        return None
    whole = F.pad(a.bfloat16(), (0, 0, 0, -len(a) % RANK)).contiguous()
    if not weight.is_contiguous() or len(whole) > WIDEST or not _ours(weight, whole, (), ()):
        return None
    half, b, squares = (0.5 * scale**2) * (a @ a.T), b.contiguous(), squares.contiguous()
    found, (o, i), (r, rank) = torch.empty(len(weight)), weight.shape, (len(whole), len(a))
    places = (t.data_ptr() for t in (weight, whole, b, half, squares))
    check(_functions()[2](*places, scale, found.data_ptr(), o, i, r, rank))  # type: ignore[index]
    return found


def add_pairs(
    x: Tensor,
    a: Tensor,
    b: Sequence[Tensor],
    ys: Sequence[Tensor],
    gains: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
) -> Tensor:
    """`y_k = gain_k (y_k + s_k b_k) + bias_k` in place, for `s = x a^T (n, sum of r)`, which is returned: `s_k` are its
    columns for layer k. Without a gain, the bias is left out too: it is in `y_k` already.

    `x (n, i)`, `a (sum of r, i)`, each `b (r, o)`, each `y (n, o)`.
    """
    if not _ours(x, a, b, ys):
        s = linear(x, a)
        for y, thin, w, gain, bias in zip(ys, s.split_with_sizes([w.shape[0] for w in b], 1), b, gains, biases):
            y.addmm_(thin, w)
            if gain is not None:
                add_gain(y, gain, bias)
        return s
    s = x.new_empty(x.shape[0], a.shape[0])
    last = [(None, None) if gain is None else (plain(gain), plain(bias)) for gain, bias in zip(gains, biases)]
    parts = _parts(b, ys, ((None, None),) * len(ys), (1.0,) * len(ys), last)
    forward = _functions()[0]  # type: ignore[index]
    check(forward(parts, len(ys), x.data_ptr(), x.stride(0), a.data_ptr(), s.data_ptr(), *x.shape))
    return s


def pair_gradients(
    x: Tensor | None,
    s: Tensor,
    a: Tensor,
    b: Sequence[Tensor],
    dys: Sequence[Tensor],
    into: Sequence[Into],
    scales: Sequence[float],
    dx: Tensor | None = None,
) -> None:
    """Adds the gradients of `add_pairs` to `into`, that of b times its scale, and to `dx (n, i)`, if given.

    `x` may be None where no gradient of a is wanted.
    """
    fit = all(t is None or (t.dtype == torch.float32 and t.is_contiguous()) for pair in into for t in pair)
    if fit and s.is_contiguous() and (dx is None or dx.stride(1) == 1) and _ours(x, a, b, dys):
        parts = _parts(b, dys, into, scales, ((None, None),) * len(dys))
        target = (None, 0) if dx is None else (dx.data_ptr(), dx.stride(0))
        backward = _functions()[1]  # type: ignore[index]
        read = (None, 0) if x is None else (x.data_ptr(), x.stride(0))
        check(backward(parts, len(dys), *read, a.data_ptr(), s.data_ptr(), *target, len(s), a.shape[1]))
        return
    if x is not None and has_triton(x.device):
        from lorakit.kernels import triton_pairs

        if triton_pairs.takes(x, s, a, b, dys, dx):
            triton_pairs.gradients(x, s, a, b, dys, into, scales, dx)
            return
    ds = torch.empty_like(s)
    widths = [w.shape[0] for w in b]
    for dy, w, thin, part, (da, db), scale in zip(
        dys, b, s.split_with_sizes(widths, 1), ds.split_with_sizes(widths, 1), into, scales
    ):
        torch.mm(dy, w.T, out=part)
        if db is not None:
            db.add_((dy.T @ thin)[:, : db.shape[1]], alpha=scale)
        if da is not None:
            assert x is not None
            da.add_((part.T @ x)[: da.shape[0]])
    if dx is not None:
        dx.addmm_(ds, a)
