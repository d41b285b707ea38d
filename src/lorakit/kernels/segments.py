"""Attention inside segments: texts stand one after the other without padding, each attends to itself only.

On a CPU one autograd function calls our C kernel once for all segments and heads (native/segments.c): float32 inside,
whatever the dtype of q, k and v. On a GPU flash attention takes them all at once where it can (varlen.py). Else, and
where nothing could be compiled, torch's own attention runs once for each run of segments of one length.
"""

import ctypes
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.kernels import varlen
from lorakit.kernels.native import library

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
    """Queries that are not simply all rows: where each segment's begin `(segments + 1,)`.

    With `places` they are some of the segment's rows, and stand at these places in it, rising. Without, they are rows
    of other texts, which look at the segments as a decoder looks at what was encoded.
    """

    starts: Tensor
    places: Tensor | None = None


class Scores(NamedTuple):
    """How much a row attends to another: `softcap(scale q k + bias)`, where `softcap(x) = cap tanh(x / cap)`.

    `causal`: not to later rows. `window`, which must be causal: only to that many rows up to itself; 0 is to all.
    `softcap` 0 is none. `bias (h, 2 m - 1)`: what each distance from `1 - m` to `m - 1` (key - query) adds, a constant;
    m is at least the length of the longest segment.
    """

    scale: float
    causal: bool = False
    window: int = 0
    softcap: float = 0.0
    bias: Tensor | None = None


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scores: Scores, asking: Asking | None = None
) -> Tensor:
    """`softmax(scores) v` inside each segment: `q (h, n, d)`, `k` and `v (h or fewer, n, d)` -> `(h, n, d)`.

    `starts (segments + 1,)`, int64 on the CPU: where each segment begins, and `n`. With `asking`, `q` has only the rows
    that it names, and so has the result. Raises ValueError where scores or queries do not fit the segments.
    """
    _check(q, starts, scores, asking)
    if q.device.type == "cpu" and q.dtype in _KNOWN and k.shape == v.shape and library() is not None:
        y: Tensor = _Segments.apply(q, k, v, starts, scores, asking)  # type: ignore[no-untyped-call]
        return y
    if asking is None:
        return _every_row(q, k, v, starts, starts, scores)
    if asking.places is None:
        return _every_row(q, k, v, asking.starts, starts, scores)
    return _some_rows(q, k, v, starts, scores, asking.starts, asking.places)


def _check(q: Tensor, starts: Tensor, scores: Scores, asking: Asking | None) -> None:
    q_starts = starts if asking is None or asking.places is not None else asking.starts
    if scores.window and not scores.causal:
        raise ValueError(f"a window of {scores.window} rows looks back only; causal must be True")
    if q_starts is not starts and scores.causal:
        raise ValueError("rows of other texts stand nowhere among the keys; causal must be False")
    if q_starts is not starts and bool((q_starts.diff() > 0)[starts.diff() == 0].any()):
        raise ValueError("rows ask in a segment without keys; leave such a text out")
    if scores.bias is None:
        return
    heads, distances = scores.bias.shape
    longest = int(torch.maximum(starts.diff(), q_starts.diff()).max())
    if heads != q.shape[0] or distances % 2 == 0 or distances < 2 * longest - 1:
        raise ValueError(
            f"a bias for {heads} heads and {distances} distances does not fit {q.shape[0]} heads and segments up to "
            f"{longest} rows; it must be ({q.shape[0]}, {2 * longest - 1}), or wider by an even number"
        )
    if scores.bias.requires_grad and torch.is_grad_enabled():
        raise ValueError("the bias is a constant here, but it learns; freeze it, or pad the rows")


class _Segments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, *how: Any) -> Tensor:
        q, k, v = _dense(q), _dense(k), _dense(v)
        heads, n, d = q.shape
        out = torch.empty(n, heads, d, dtype=q.dtype).transpose(0, 1)
        lse = torch.empty(n, heads)
        _call("segments_forward", [q, k, v, out], lse, starts, *how)
        ctx.save_for_backward(q, k, v, out, lse, starts)
        ctx.how = how
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, lse, starts = ctx.saved_tensors
        dq, dk, dv = _gradients_like(q, k, v)
        _call("segments_backward", [q, k, v, out, _dense(dout), dq, dk, dv], lse, starts, *ctx.how)
        return dq, dk, dv, None, None, None


class _Plan(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q_starts", "k_starts", "places", "bias")),
        *((name, _LONG) for name in ("n_segments", "heads", "kv_heads", "d", "reach", "window")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("causal", ctypes.c_int),
        ("half", ctypes.c_int),
    ]


def _call(name: str, views: list[Tensor], lse: Tensor, starts: Tensor, scores: Scores, asking: Asking | None) -> None:
    q, k = views[:2]
    q_starts, places = (starts, None) if asking is None else asking
    bias = None if scores.bias is None else scores.bias.detach().float().contiguous()
    plan = _Plan(
        *(None if x is None else x.data_ptr() for x in (q_starts, starts, places, bias)),
        *(len(starts) - 1, q.shape[0], k.shape[0], q.shape[2], 0 if bias is None else (bias.shape[1] + 1) // 2),
        *(scores.window, scores.scale, scores.softcap, scores.causal, q.dtype == torch.bfloat16),
    )
    if getattr(library(), name)(*map(_view, views), ctypes.c_void_p(lse.data_ptr()), ctypes.byref(plan)):
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


def _every_row(q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, scores: Scores) -> Tensor:
    """The same by what torch has for the device."""
    if varlen.takes(q, v, scores.bias, scores.softcap):
        return varlen.attend(q, k, v, q_starts, k_starts, scores.scale, scores.causal, scores.window)
    return _by_length(q, k, v, q_starts, k_starts, scores)


def _by_length(q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, scores: Scores) -> Tensor:
    """The same with torch's attention, one call for each run of segments of one length."""
    lengths = zip(q_starts.diff().tolist(), k_starts.diff().tolist())
    runs = [(asks, n, len(list(same))) for (asks, n), same in groupby(lengths)]
    asked = q.split_with_sizes([asks * count for asks, _, count in runs], 1)
    sizes = [n * count for _, n, count in runs]
    parts = []
    for (asks, _, count), *blocks in zip(runs, asked, k.split_with_sizes(sizes, 1), v.split_with_sizes(sizes, 1)):
        if not asks:
            continue
        a, b, c = (x.view(x.shape[0], count, -1, x.shape[2]).transpose(0, 1) for x in blocks)
        parts.append(_attend(a, b, c, scores).transpose(0, 1).flatten(1, 2))
    return torch.cat(parts, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
    """Attention of `q (b, h, asks, d)` to `k` and `v (b, h or fewer, n, d)`."""
    asks, n, shared = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    how: dict[str, Any] = {"scale": scores.scale, "enable_gqa": shared > 1}
    if scores.bias is None and not scores.softcap and not 0 < scores.window < n:
        return F.scaled_dot_product_attention(q, k, v, is_causal=scores.causal, **how)
    distance = torch.arange(n, device=q.device) - torch.arange(asks, device=q.device)[:, None]
    unseen = (distance > 0) & scores.causal
    if scores.window:
        unseen |= distance <= -scores.window
    if scores.bias is None:
        added = q.new_zeros(asks, n)
    else:
        added = scores.bias[:, distance + scores.bias.shape[1] // 2].to(q)
    if not scores.softcap:
        return F.scaled_dot_product_attention(q, k, v, added.masked_fill(unseen, -torch.inf), **how)
    x = scores.scale * q @ k.repeat_interleave(shared, 1).mT + added
    x = scores.softcap * torch.tanh(x / scores.softcap)
    return x.masked_fill(unseen, -torch.inf).softmax(-1) @ v.repeat_interleave(shared, 1)


def _some_rows(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scores: Scores, q_starts: Tensor, places: Tensor
) -> Tensor:
    """The same for some rows only: all rows ask, and those that were meant are kept."""
    rows = (places + torch.repeat_interleave(starts[:-1], q_starts.diff())).to(q.device)
    every = q.new_zeros(q.shape[0], k.shape[1], q.shape[2]).index_copy(1, rows, q)
    return _every_row(every, k, v, starts, starts, scores)[:, rows]
