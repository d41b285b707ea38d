"""A convolution in two dimensions and its pair: `y = W * x + bias + scale * b (a * x)`, by hand.

For inputs whose channels lie last in memory: there a convolution's output is a matrix with a row for each place, so the
second half of the pair is a product that is added in place. The backward keeps `x` and the thin `a * x`; layer and pair
have one input gradient, by a convolution with `a` behind the outputs of `W`. A kernel of 1 x 1 is a product altogether,
and runs as one (kernels/lora.py): torch's convolutions take 2 to 10 times as long for the same.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorakit.attach.kernels.lora import Layer, Ready, lora_group


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


def joined(rank: int, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight (o, i, *kernel)` and room for `a` behind it, zeros: `(o + rank, i, *kernel)`."""
    behind = weight.new_zeros(rank, *weight.shape[1:], dtype=dtype)
    return torch.cat([weight.detach().to(dtype), behind]).contiguous(memory_format=torch.channels_last)


def _rows(maps: Tensor) -> Tensor:
    """`(b, c, h, w)` as `(b h w, c)`, without a copy where channels lie last."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def _maps(rows: Tensor, b: int, h: int, w: int) -> Tensor:
    return rows.view(b, h, w, -1).permute(0, 3, 1, 2)


class _Conv(torch.autograd.Function):
    """Inputs: x, (geometry, scale, Ready, joined weight, bias), a, b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, how: Any, a: Tensor, b: Tensor) -> Tensor:
        geometry, _, now, weight, bias = how
        y: Tensor = geometry.run(x, weight[: -len(now.a)], bias).contiguous(memory_format=torch.channels_last)
        s = _rows(geometry.run(x, now.a, None))
        ctx.save_for_backward(x, s, a, b)
        ctx.how = how
        _rows(y).addmm_(s, now.b[0])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, s, a, b = ctx.saved_tensors
        geometry, scale, now, weight, _ = ctx.how
        rows, size, dx, da, db = _rows(dy), (len(dy), *dy.shape[2:]), None, None, None
        ds = rows @ now.b[0].T
        if ctx.needs_input_grad[0]:
            dx = geometry.gradients(_maps(torch.cat([rows, ds], 1), *size), x, weight, (True, False))[0]
        if ctx.needs_input_grad[2]:
            da = geometry.gradients(_maps(ds, *size), x, now.a, (False, True))[1][: len(a)].reshape(a.shape)
        if ctx.needs_input_grad[3]:
            db = (rows.T @ s)[:, : b.shape[1]] * scale
        if not now.into:
            return dx, None, None if da is None else da.to(a.dtype), None if db is None else db.to(b.dtype)
        into_a, into_b = now.into[0]
        into_a.add_(da)
        into_b.add_(db)
        return dx, None, None, None


def lora_conv(x: Tensor, layer: Layer, geometry: Geometry, now: Ready, gain: Tensor | None = None) -> Tensor:
    """The layer with its pair, for `x (b, i, height, width)` with channels last: `(b, o, height', width')`.

    `layer.weight (o + r, i, *kernel)` is `joined`; `layer.a (r, i * kernel)` and `layer.b (o, r)` are the masters of
    `now`, whose `a (r, i, *kernel)` is a window of that weight. Where the outputs have a `gain (o,)`, it is in the
    weight, the bias and `now.b` already; the gradient of b takes it from here.
    """
    scale = layer.scale if gain is None else layer.scale * gain[:, None]
    how = (geometry, scale, now, layer.weight, layer.bias)
    y: Tensor = _Conv.apply(x, how, layer.a, layer.b)  # type: ignore[no-untyped-call]
    return y


def is_product(geometry: Geometry, weight: Tensor) -> bool:
    """The kernel is 1 x 1, over places of the input as they are."""
    return tuple(weight.shape[2:]) == (1, 1) and geometry.padding == (0, 0)


def lora_point(x: Tensor, layer: Layer, geometry: Geometry, now: Ready) -> Tensor:
    """The same for a kernel of 1 x 1; `layer.weight (o, i)` and `now` as `lora_group` takes them."""
    down, right = geometry.stride
    if (down, right) != (1, 1):
        x = x[:, :, ::down, ::right]
    size = len(x), *x.shape[2:]
    return _maps(lora_group(_rows(x), [layer], now)[0], *size)
