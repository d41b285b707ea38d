"""The gradient of a factor, added where it belongs: in bfloat16 by our C function where the processor can.

The other thin products (`x a^T`, `y += s b`) were written the same way and were no faster than torch's: dev/LOG.md.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor

from lorakit.attach.kernels.native import library

_LONG = ctypes.c_int64


@cache
def _known() -> bool:
    native = library()
    return native is not None and bool(native.thin_known())


def _ours(*tensors: Tensor) -> bool:
    return _known() and all(t.dtype == torch.bfloat16 and t.device.type == "cpu" and t.stride(-1) == 1 for t in tensors)


def _rows(x: Tensor) -> tuple[ctypes.c_void_p, ctypes.c_int64]:
    return ctypes.c_void_p(x.data_ptr()), _LONG(x.stride(0))


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for the factors of one layer")


def add_gradient(into: Tensor, s: Tensor, y: Tensor, scale: float = 1.0) -> None:
    """`into (r, o) += scale s^T y` for `s (n, r or more)`, `y (n, o)`; `into` is float32 and may be transposed."""
    r, o = into.shape
    if not _ours(s, y) or o % 32 or into.dtype != torch.float32:
        into.add_((s.T @ y)[:r], alpha=scale)
        return
    strides, sizes = map(_LONG, into.stride()), map(_LONG, (y.shape[0], o, r))
    place = ctypes.c_void_p(into.data_ptr())
    _check(library().thin_left(*_rows(s), *_rows(y), place, *strides, *sizes, ctypes.c_float(scale)))  # type: ignore[union-attr]
