"""Weights in 8 or 4 bits made numbers again, in one reading (native/codes.c); by torch where there is no C.

Rows of 4-bit codes: within every 32 numbers, byte k has number k in its low half and number k + 16 in its high half.
"""

import ctypes

import torch
from torch import Tensor

from lorakit.kernels.native import library, place

_LONG = ctypes.c_int64
GROUP = 32  # numbers whose codes are kept in 16 bytes


def _native(codes: Tensor, dtype: torch.dtype) -> bool:
    return (
        codes.device.type == "cpu"
        and dtype in (torch.float32, torch.bfloat16)
        and codes.is_contiguous()
        and not torch.compiler.is_compiling()
        and library() is not None
    )


def _inside(rows: Tensor | None, n: int) -> Tensor | None:
    """The rows as C reads them. IndexError for one that is not there."""
    if rows is None or not len(rows):
        return rows
    least, most = (int(x) for x in torch.aminmax(rows))
    if least < 0 or most >= n:
        raise IndexError(f"row {least if least < 0 else most} is asked for, and there are {n}")
    return rows.contiguous()


def unpack_bytes(codes: Tensor, scales: Tensor, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
    """`codes (n, i)` int8 times `scales (n,)` float32, as `(n, i)` in `dtype`; or only of `rows (k,)`, as `(k, i)`."""
    if not _native(codes, dtype):
        codes, scales = (codes, scales) if rows is None else (codes[rows], scales[rows])
        return (codes.float() * scales.unsqueeze(1)).to(dtype)
    rows = _inside(rows, len(codes))
    k, i = len(codes) if rows is None else len(rows), codes.shape[1]
    y = torch.empty(k, i, dtype=dtype)
    places = [place(codes), place(scales), place(rows), place(y)]
    library().unpack_bytes(*places, _LONG(k), _LONG(i), int(dtype == torch.bfloat16))  # type: ignore[union-attr]
    return y


def unpack_halves(
    codes: Tensor,
    scales: Tensor,
    table: Tensor,
    i: int,
    block: int,
    dtype: torch.dtype,
    rows: Tensor | None = None,
) -> Tensor:
    """`table[code] * scale` as `(n, i)` in `dtype`, or only of `rows (k,)`.

    `codes (n, ceil(i / 32) * 16)` uint8, `scales (n, ceil(i / block))` bfloat16, `table (16,)` float32.
    """
    if not _native(codes, dtype):
        codes, scales = (codes, scales) if rows is None else (codes[rows], scales[rows])
        pairs = codes.view(len(codes), -1, GROUP // 2)
        at = torch.cat([pairs & 15, pairs >> 4], -1).flatten(1)[:, :i]
        wide = scales.float().repeat_interleave(block, 1)[:, :i]
        return (table[at.int()] * wide).to(dtype)
    rows = _inside(rows, len(codes))
    k = len(codes) if rows is None else len(rows)
    y = torch.empty(k, i, dtype=dtype)
    places = [place(codes), place(scales), place(table), place(rows), place(y)]
    sizes = map(_LONG, (k, i, codes.shape[1], block))
    library().unpack_halves(*places, *sizes, int(dtype == torch.bfloat16))  # type: ignore[union-attr]
    return y


def pack_halves(codes: Tensor) -> Tensor:
    """Codes below 16 `(n, i)` uint8 -> two to a byte, `(n, ceil(i / 32) * 16)`."""
    short = -codes.shape[1] % GROUP
    groups = torch.nn.functional.pad(codes, (0, short)).view(len(codes), -1, 2, GROUP // 2)
    return (groups[:, :, 0] | (groups[:, :, 1] << 4)).flatten(1)
