"""The backward of low-rank pairs on a GPU, in Triton: each wide matrix is read once, where cuBLAS reads it twice.

Of `y_k += s_k b_k`, `s = x a^T` (thin.py), the gradients are `ds_k = dy_k b_k^T`, `db_k = dy_k^T s_k`, `da = ds^T x`
and `dx += ds a`. `_by_outputs` makes `ds_k` and `db_k` of one reading of `dy_k (n, o)`; `_by_inputs` makes `da` and
adds to `dx` for the whole group in one launch, of `ds`, which is read once. The forward stays with cuBLAS: `s = x a^T`
is a plain product, and `addmm_` adds to `y` where it stands, with nothing of its size in between.

Programs own a block of rows and a span of columns, sums over them are kept apart and added up at the end: the same
numbers in every run, which atomic additions would not give. Sums are float32 throughout. Any n, i, o and ranks: what
sticks out of a block is masked, ranks are filled up with zeros to a power of two from 16 on, the least that the matrix
units take.

Checked in Triton's interpreter (`TRITON_INTERPRET=1`) against float64; its `dot` is wrong for half precision (3.9.0),
so operands are widened there. How fast they are on a GPU: benchmarks/gpu.py.
"""
# ruff: noqa: N803  # Triton's constants

import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 32}  # sum of a group's ranks that registers hold
_ROWS = 64  # of one block
_SPAN = 512  # columns of dy, or rows of x, that one program goes through


@triton.jit  # type: ignore[untyped-decorator]
def _by_outputs(  # type: ignore[no-untyped-def]
    dy, b, s, ds, db, n, o, r, dy_row, s_row, b_row, b_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SPAN: tl.constexpr, R: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Of a block of rows and a span of columns: its part of `ds (.., n, r)`, and of `db (.., o, r)` for these rows."""
    block, span = tl.program_id(0), tl.program_id(1)
    rows = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    ranks = tl.arange(0, R)
    row_there, rank_there = rows < n, ranks < r
    thin = tl.load(s + rows[:, None] * s_row + ranks[None, :], mask=row_there[:, None] & rank_there[None, :], other=0.0)
    if WIDE:
        thin = thin.to(tl.float32)
    total = tl.zeros((ROWS, R), dtype=tl.float32)
    for begin in range(span * SPAN, tl.minimum(span * SPAN + SPAN, o), COLUMNS):
        columns = begin + tl.arange(0, COLUMNS)
        there = columns < o
        part = tl.load(
            dy + rows[:, None] * dy_row + columns[None, :], mask=row_there[:, None] & there[None, :], other=0.0
        )
        place = b + ranks[:, None] * b_row + columns[None, :] * b_column
        right = tl.load(place, mask=rank_there[:, None] & there[None, :], other=0.0)
        if WIDE:
            part, right = part.to(tl.float32), right.to(tl.float32)
        total += tl.dot(part, tl.trans(right), input_precision="ieee")
        mine = tl.dot(tl.trans(part), thin, input_precision="ieee")
        place = (block.to(tl.int64) * o + columns)[:, None] * r + ranks[None, :]
        tl.store(db + place, mine, mask=there[:, None] & rank_there[None, :])
    place = (span.to(tl.int64) * n + rows)[:, None] * r + ranks[None, :]
    tl.store(ds + place, total, mask=row_there[:, None] & rank_there[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _by_inputs(  # type: ignore[no-untyped-def]
    ds, x, a, dx, da, n, i, r, x_row, dx_row, HAS_DX: tl.constexpr, HAS_DA: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, SPAN: tl.constexpr, R: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Of a span of rows and a block of columns: `dx += ds a`, and its part of `da (.., r, i)`."""
    span, block = tl.program_id(0), tl.program_id(1)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, R)
    there, rank_there = columns < i, ranks < r
    right = tl.load(a + ranks[:, None] * i + columns[None, :], mask=rank_there[:, None] & there[None, :], other=0.0)
    if WIDE:
        right = right.to(tl.float32)
    total = tl.zeros((R, COLUMNS), dtype=tl.float32)
    for begin in range(span * SPAN, tl.minimum(span * SPAN + SPAN, n), ROWS):
        rows = (begin + tl.arange(0, ROWS)).to(tl.int64)
        row_there = rows < n
        both = row_there[:, None] & there[None, :]
        thin = tl.load(
            ds + rows[:, None] * r + ranks[None, :], mask=row_there[:, None] & rank_there[None, :], other=0.0
        )
        if WIDE:
            thin = thin.to(tl.float32)
        if HAS_DX:
            place = dx + rows[:, None] * dx_row + columns[None, :]
            now = tl.load(place, mask=both, other=0.0).to(tl.float32)
            now += tl.dot(thin, right, input_precision="ieee")
            tl.store(place, now.to(dx.dtype.element_ty), mask=both)
        if HAS_DA:
            part = tl.load(x + rows[:, None] * x_row + columns[None, :], mask=both, other=0.0)
            if WIDE:
                part = part.to(tl.float32)
            total += tl.dot(tl.trans(thin), part, input_precision="ieee")
    if HAS_DA:
        place = (span.to(tl.int64) * r + ranks)[:, None] * i + columns[None, :]
        tl.store(da + place, total, mask=rank_there[:, None] & there[None, :])


def _blocks(rank: int, dtype: torch.dtype) -> dict[str, Any]:
    """How the kernels cut their matrices for this rank. So cut, compiled for sm_80 and sm_90 they spill no register."""
    r = max(16, triton.next_power_of_2(rank))
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    columns = 64 if r <= 32 and dtype != torch.float32 else 32
    return {"ROWS": _ROWS, "COLUMNS": columns, "SPAN": _SPAN, "R": r, "WIDE": interpreted or dtype == torch.float32}


def takes(x: Tensor, s: Tensor, a: Tensor, b: Sequence[Tensor], dys: Sequence[Tensor], dx: Tensor | None) -> bool:
    """Whether the kernels can have these (see `gradients`)."""
    matrices = [x, *dys, *([] if dx is None else [dx])]
    return (
        x.dtype in WIDEST
        and len(x) > 0
        and s.shape[1] <= WIDEST[x.dtype]
        and all(m.dtype == x.dtype and m.stride(1) == 1 for m in (*matrices, s))
        and a.is_contiguous()
        and all(w.dtype == x.dtype for w in (a, *b))
    )


def gradients(
    x: Tensor,
    s: Tensor,
    a: Tensor,
    b: Sequence[Tensor],
    dys: Sequence[Tensor],
    into: Sequence[tuple[Tensor | None, Tensor | None]],
    scales: Sequence[float],
    dx: Tensor | None,
) -> None:
    """What `thin.pair_gradients` does: adds to `into` those of each a and b, that of b times its scale, and to `dx`."""
    ds = torch.empty_like(s, memory_format=torch.contiguous_format)
    column = 0
    for dy, w, (_, db), scale in zip(dys, b, into, scales):
        r = len(w)
        own = slice(column, column + r)
        found, mine = _outputs(dy, w, s[:, own])
        ds[:, own] = found
        if db is not None:
            db.add_(mine[:, : db.shape[1]], alpha=scale)
        column += r
    wants_a = any(da is not None for da, _ in into)
    whole = _inputs(ds, x, a, dx, wants_a)
    if whole is None:
        return
    for (da, _), part in zip(into, whole.split_with_sizes([w.shape[0] for w in b])):
        if da is not None:
            da.add_(part[: da.shape[0]])


def _outputs(dy: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """`dy b^T (n, r)` and `dy^T s (o, r)`, float32, for `dy (n, o)`, `b (r, o)`, `s (n, r)`."""
    (n, o), r = dy.shape, b.shape[0]
    cut = _blocks(r, dy.dtype)
    grid = (triton.cdiv(n, cut["ROWS"]), triton.cdiv(o, cut["SPAN"]))
    ds = dy.new_empty(grid[1], n, r, dtype=torch.float32)
    db = dy.new_empty(grid[0], o, r, dtype=torch.float32)
    _by_outputs[grid](dy, b, s, ds, db, n, o, r, dy.stride(0), s.stride(0), *b.stride(), **cut)
    return ds.sum(0), db.sum(0)


def _inputs(ds: Tensor, x: Tensor, a: Tensor, dx: Tensor | None, wants_a: bool) -> Tensor | None:
    """Adds `ds a` to `dx (n, i)`, if given; gives `ds^T x (r, i)`, float32, if wanted."""
    (n, i), r = x.shape, a.shape[0]
    if dx is None and not wants_a:
        return None
    cut = _blocks(r, x.dtype)
    grid = (triton.cdiv(n, cut["SPAN"]), triton.cdiv(i, cut["COLUMNS"]))
    da = x.new_empty(grid[0] if wants_a else 1, r, i if wants_a else 1, dtype=torch.float32)
    given = x if dx is None else dx
    _by_inputs[grid](
        ds, x, a, given, da, n, i, r, x.stride(0), given.stride(0), HAS_DX=dx is not None, HAS_DA=wants_a, **cut
    )
    return da.sum(0) if wants_a else None
