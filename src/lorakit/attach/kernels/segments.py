"""Attention inside segments: texts stand one after the other without padding, each attends to itself only.

On a CPU one autograd function calls our C kernel once for all segments and heads (native/segments.c): float32 inside,
whatever the dtype of q, k and v. Elsewhere, and where nothing could be compiled, torch's own attention runs once for
each run of segments of one length.
"""

import ctypes
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.attach.kernels.native import library

_KNOWN = (torch.float32, torch.bfloat16)
_LONG = ctypes.c_int64


class _View(ctypes.Structure):
    _fields_ = [("first", ctypes.c_void_p), ("token", ctypes.c_int64), ("head", ctypes.c_int64)]


def _view(x: Tensor) -> Any:
    """What the kernel needs to know of `x (heads, tokens, d)`."""
    head, token, _ = x.stride()
    return ctypes.byref(_View(x.data_ptr(), token, head))


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class Asking(NamedTuple):
    """Queries of some rows only: where each segment's begin `(segments + 1,)`, and the place of each there, rising."""

    starts: Tensor
    places: Tensor


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    scale: float,
    causal: bool,
    asking: Asking | None = None,
    window: int = 0,
) -> Tensor:
    """`softmax(scale q k^T) v` inside each segment: `q (h, n, d)`, `k` and `v (h or fewer, n, d)` -> `(h, n, d)`.

    `starts (segments + 1,)`, int64 on the CPU: where each segment begins, and `n`. With `asking`, `q` has only the rows
    that it names, and so has the result. With `window`, which must be causal, a row sees that many rows up to itself.
    """
    if q.device.type == "cpu" and q.dtype in _KNOWN and k.shape == v.shape and library() is not None:
        y: Tensor = _Segments.apply(q, k, v, starts, scale, causal, asking, window)  # type: ignore[no-untyped-call]
        return y
    if asking is not None:
        return _some_rows(q, k, v, starts, scale, causal, asking, window)
    return _by_length(q, k, v, starts, scale, causal, window)


class _Segments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, *how: Any) -> Tensor:
        q, k, v = _dense(q), _dense(k), _dense(v)
        heads, n, d = q.shape
        out = torch.empty(n, heads, d, dtype=q.dtype).transpose(0, 1)
        lse = torch.empty(n, heads)
        _call("segments_forward", [q, k, v, out], lse, starts, how)
        ctx.save_for_backward(q, k, v, out, lse, starts)
        ctx.how = how
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, lse, starts = ctx.saved_tensors
        dq, dk, dv = _gradients_like(q, k, v)
        _call("segments_backward", [q, k, v, out, _dense(dout), dq, dk, dv], lse, starts, ctx.how)
        return dq, dk, dv, None, None, None, None, None


class _Plan(ctypes.Structure):
    _fields_ = [
        ("q_starts", ctypes.c_void_p),
        ("k_starts", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("n_segments", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("causal", ctypes.c_int),
    ]


def _call(name: str, views: list[Tensor], lse: Tensor, starts: Tensor, how: tuple[Any, ...]) -> None:
    scale, causal, asking, window = how
    q, k = views[:2]
    heads, _, d = q.shape
    begins, places = (starts, None) if asking is None else asking
    place = 0 if places is None else places.data_ptr()
    plan = _Plan(begins.data_ptr(), starts.data_ptr(), place, len(starts) - 1, window, int(causal))
    failed = getattr(library(), name)(
        *map(_view, views),
        ctypes.c_void_p(lse.data_ptr()),
        ctypes.byref(plan),
        *map(_LONG, (heads, k.shape[0], d)),
        ctypes.c_float(scale),
        int(q.dtype == torch.bfloat16),
    )
    if failed:
        raise MemoryError("no memory for the attention of one segment; shorten the texts")


def _gradients_like(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the gradients. Where q, k and v are columns of one matrix, so are these: nothing has to be joined."""
    widths = [x.shape[0] * x.shape[2] for x in (q, k, v)]
    total, n = sum(widths), q.shape[1]
    places = [x.data_ptr() // x.element_size() for x in (q, k, v)]
    joined = all(x.stride() == (x.shape[2], total, 1) for x in (q, k, v))
    if (
        joined
        and q.shape[1] == k.shape[1]
        and places[1] == places[0] + widths[0]
        and places[2] == places[1] + widths[1]
    ):
        whole = torch.empty(n, total, dtype=q.dtype)
        parts = whole.split_with_sizes(widths, 1)
        dq, dk, dv = (part.view(n, x.shape[0], x.shape[2]).transpose(0, 1) for part, x in zip(parts, (q, k, v)))
        return dq, dk, dv
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _by_length(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, causal: bool, window: int = 0) -> Tensor:
    """The same with torch's attention, one call for each run of segments of one length."""
    bounds = starts.tolist()
    lengths = [end - begin for begin, end in pairwise(bounds)]
    runs: list[tuple[int, int]] = []  # length, how many
    for length in lengths:
        if runs and runs[-1][0] == length:
            runs[-1] = (length, runs[-1][1] + 1)
        else:
            runs.append((length, 1))
    sizes = [length * count for length, count in runs]
    parts = []
    for (length, count), *blocks in zip(runs, *(x.split_with_sizes(sizes, 1) for x in (q, k, v))):
        a, b, c = (x.unflatten(1, (count, length)).transpose(0, 1) for x in blocks)
        how: dict[str, Any] = {"scale": scale, "enable_gqa": q.shape[0] != k.shape[0]}
        if 0 < window < length:
            band = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().triu(1 - window)
            y = F.scaled_dot_product_attention(a, b, c, band, **how)
        else:
            y = F.scaled_dot_product_attention(a, b, c, is_causal=causal, **how)
        parts.append(y.transpose(0, 1).flatten(1, 2))
    return torch.cat(parts, 1)


def _some_rows(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, causal: bool, asking: Asking, window: int
) -> Tensor:
    """The same for some rows only: all rows ask, and those that were meant are kept."""
    rows = asking.places + torch.repeat_interleave(starts[:-1], asking.starts.diff())
    every = q.new_zeros(q.shape[0], k.shape[1], q.shape[2]).index_copy(1, rows.to(q.device), q)
    return _by_length(every, k, v, starts, scale, causal, window)[:, rows.to(q.device)]
