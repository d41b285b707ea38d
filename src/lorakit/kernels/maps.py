"""The low-rank side of a convolution: `a * x` with the layer's own kernel size, and the product with b behind it.

Channels lie last, so that a map is a matrix with a row for each place. In bfloat16 by our C functions (native/maps.c)
where the processor can: one call where torch takes a convolution and a product, and for the gradients another where it
takes four, which for eight outputs cost as much as the layer itself. Else by torch.
"""

import ctypes
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.kernels.native import library
from lorakit.kernels.thin import RANK, WIDEST, WIDTH, Into, check

_LARGEST = 1 << 22  # places of a table: 16 MiB
_KEPT = 4 * _LARGEST  # of all tables that are kept
_tables: dict[Any, Tensor] = {}  # the last one that was asked for stands last


class Geometry(NamedTuple):
    """How a kernel moves over its input, in both dimensions."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, module: nn.Module) -> "Geometry | None":
        """Of a `nn.Conv2d`; None where it has groups or another padding than zeros, which are not done here."""
        if not isinstance(module, nn.Conv2d) or module.groups > 1 or module.padding_mode != "zeros":
            return None
        return None if isinstance(module.padding, str) else cls(module.stride, module.padding, module.dilation)

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution."""
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)

    def gradients(self, dy: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
        """Of the input and the weight, those that are needed."""
        rest = [False, [0, 0], 1, [*needs, False]]  # not transposed, no more padding, one group
        backward = torch.ops.aten.convolution_backward
        return backward(dy, x, weight, None, self.stride, self.padding, self.dilation, *rest)[:2]  # type: ignore[no-any-return]


def rows_of(maps: Tensor) -> Tensor:
    """`(b, c, h, w)` as `(b h w, c)`, without a copy where channels lie last."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def maps_of(rows: Tensor, b: int, h: int, w: int) -> Tensor:
    """The inverse of `rows_of`."""
    return rows.view(b, h, w, -1).permute(0, 3, 1, 2)


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "a", "b", "y", "s", "joined", "da", "db", "gain", "table")),
        *((name, ctypes.c_int64) for name in ("n", "size", "places", "kernel", "i", "o", "r", "rank")),
        ("scale", ctypes.c_float),
    ]


@cache
def _functions() -> tuple[Any, Any] | None:
    """Forward and backward, or None where they cannot run."""
    native = library()
    return None if native is None or not native.thin_known() else (native.maps_forward, native.maps_backward)


def _table(*what: Any) -> Tensor:
    """The same from those that are kept, as many as `_KEPT` places allow."""
    found = _tables.pop(what, None)
    if found is None:
        found = _made_table(*what)
        while found.numel() + sum(table.numel() for table in _tables.values()) > _KEPT:
            del _tables[next(iter(_tables))]
    _tables[what] = found
    return found


def _made_table(geometry: Geometry, kernel: tuple[int, ...], height: int, width: int) -> Tensor:
    """`(places of the output, places of the kernel)`: which place of the input is read; -1 is outside."""
    numbers = torch.arange(1, height * width + 1, dtype=torch.float64).view(1, 1, height, width)
    stride, padding, dilation = geometry
    columns = F.unfold(numbers, kernel, dilation, padding, stride)[0]
    return columns.T.contiguous().to(torch.int32) - 1


def _ours(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> bool:
    last, kernel = torch.channels_last, a.shape[2] * a.shape[3]
    return (
        x.dtype == y.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and x.numel() > 0
        and x.shape[1] % WIDTH == 0
        and b.shape[1] % WIDTH == 0
        and b.shape[0] % RANK == 0
        and b.shape[0] <= WIDEST
        and y.shape[2] * y.shape[3] * kernel <= _LARGEST
        and b.is_contiguous()
        and all(t.is_contiguous(memory_format=last) for t in (x, y, a))
        and _functions() is not None
    )


def _call(
    geometry: Geometry, x: Tensor, y: Tensor, a: Tensor, b: Tensor, s: Tensor, **more: Any
) -> tuple[_Call, list[Tensor]]:
    """What the C functions take, and what has to live as long as it."""
    table = _table(geometry, tuple(a.shape[2:]), *x.shape[2:])
    size, places = x.shape[2] * x.shape[3], y.shape[2] * y.shape[3]
    numbers: dict[str, int | float] = {
        "n": len(x),
        "size": size,
        "places": places,
        "kernel": table.shape[1],
        "i": x.shape[1],
    }
    numbers |= {"r": b.shape[0], "o": b.shape[1], "rank": b.shape[0]}
    tensors = {"x": x, "a": a, "b": b, "y": y, "s": s, "table": table}
    tensors |= {name: value for name, value in more.items() if isinstance(value, Tensor)}
    numbers |= {name: value for name, value in more.items() if isinstance(value, int | float)}
    places_of = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    return _Call(**places_of, **numbers), [*tensors.values()]


def add_conv_pair(geometry: Geometry, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`y += b (a * x)` in place; returns `s = a * x` as `(places of all maps, r)`.

    `x (n, i, h, w)` and `y (n, o, h', w')` with channels last, `a (r, i, *kernel)`, `b (r, o)`.
    """
    if not _ours(x, y, a, b):
        s = rows_of(geometry.run(x, a, None))
        rows_of(y).addmm_(s, b)
        return s
    s = x.new_empty(len(y) * y.shape[2] * y.shape[3], len(a))
    call, _alive = _call(geometry, x, y, a, b, s)
    check(_functions()[0](ctypes.byref(call)))  # type: ignore[index]
    return s


def conv_pair_gradients(
    geometry: Geometry,
    x: Tensor,
    s: Tensor,
    a: Tensor,
    b: Tensor,
    dy: Tensor,
    into: Into,
    scale: float,
    gain: Tensor | None = None,
) -> Tensor:
    """Adds the gradients of `add_conv_pair` to `into`: a's `(rank, i * kernel)`, and b's `(o, rank)` times its scale
    and the gain `(o,)` of each output, if given. Returns dy and ds beside each other, `(n, o + r, h', w')`."""
    da, db = into
    size = len(dy), *dy.shape[2:]
    fit = all(t is None or (t.dtype == torch.float32 and t.is_contiguous()) for t in (da, db, gain))
    if fit and s.is_contiguous() and _ours(x, dy, a, b):
        rank = da.shape[0] if da is not None else db.shape[1] if db is not None else len(b)
        joined = dy.new_empty(len(s), dy.shape[1] + len(b))
        call, _alive = _call(
            geometry, x, dy, a, b, s, joined=joined, da=da, db=db, gain=gain, rank=rank, scale=float(scale)
        )
        check(_functions()[1](ctypes.byref(call)))  # type: ignore[index]
        return maps_of(joined, *size)
    rows = rows_of(dy)
    ds = rows @ b.T
    if da is not None:
        found = geometry.gradients(maps_of(ds, *size), x, a, (False, True))[1]
        da.add_(found[: len(da)].reshape(da.shape))
    if db is not None:
        found = (rows.T @ s)[:, : db.shape[1]] * scale
        db.add_(found if gain is None else found * gain[:, None])
    return maps_of(torch.cat([rows, ds], 1), *size)
