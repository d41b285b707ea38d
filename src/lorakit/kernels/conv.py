"""A convolution in two dimensions and its pair: `y = W * x + bias + scale * b (a * x)`, by hand.

For inputs whose channels lie last in memory: there a convolution's output is a matrix with a row for each place, so the
second half of the pair is a product that is added in place. The backward keeps `x` and the thin `a * x`; layer and pair
have one input gradient, by a convolution with `a` behind the outputs of `W`. A kernel of 1 x 1 is a product altogether,
and runs as one (kernels/lora.py): torch's convolutions take 2 to 10 times as long for the same.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.kernels.lora import Layer, Ready, lora_group
from lorakit.kernels.maps import Geometry, add_conv_pair, conv_pair_gradients, maps_of, rows_of
from lorakit.kernels.thin import Into


def joined(rank: int, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight (o, i, *kernel)` and room for `a` behind it, zeros: `(o + rank, i, *kernel)`."""
    behind = weight.new_zeros(rank, *weight.shape[1:], dtype=dtype)
    return torch.cat([weight.detach().to(dtype), behind]).contiguous(memory_format=torch.channels_last)


class _Conv(torch.autograd.Function):
    """Inputs: x, (geometry, scale, gain, Ready, joined weight, bias), a, b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, how: Any, a: Tensor, b: Tensor) -> Tensor:
        geometry, _, _, now, weight, bias = how
        y: Tensor = geometry.run(x, weight[: -len(now.a)], bias).contiguous(memory_format=torch.channels_last)
        s = add_conv_pair(geometry, x, y, now.a, now.b[0])
        ctx.save_for_backward(x, s, a, b)
        ctx.how = how
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, s, a, b = ctx.saved_tensors
        geometry, scale, gain, now, weight, _ = ctx.how
        dy = dy.contiguous(memory_format=torch.channels_last)
        into: Into = (now.into or [(_zeros(a, ctx.needs_input_grad[2]), _zeros(b, ctx.needs_input_grad[3]))])[0]
        both = conv_pair_gradients(geometry, x, s, now.a, now.b[0], dy, into, scale, gain)
        dx = geometry.gradients(both, x, weight, (True, False))[0] if ctx.needs_input_grad[0] else None
        return dx, None, *((None, None) if now.into else into)


def _zeros(factor: Tensor, wanted: bool) -> Tensor | None:
    return torch.zeros_like(factor) if wanted else None


def lora_conv(x: Tensor, layer: Layer, geometry: Geometry, now: Ready, gain: Tensor | None = None) -> Tensor:
    """The layer with its pair, for `x (b, i, height, width)` with channels last: `(b, o, height', width')`.

    `layer.weight (o + r, i, *kernel)` is `joined`; `layer.a (r, i * kernel)` and `layer.b (o, r)` are the masters of
    `now`, whose `a (r, i, *kernel)` is a window of that weight. Where the outputs have a `gain (o,)`, it is in the
    weight, the bias and `now.b` already; the gradient of b takes it from here.
    """
    how = (geometry, layer.scale, gain, now, layer.weight, layer.bias)
    y: Tensor = _Conv.apply(x, how, layer.a, layer.b)  # type: ignore[no-untyped-call]
    return y


def is_product(geometry: Geometry, weight: Tensor) -> bool:
    """The kernel is 1 x 1, over places of the input as they are."""
    return tuple(weight.shape[2:]) == (1, 1) and geometry.padding == (0, 0)


class _Every(torch.autograd.Function):
    """Every so many rows and columns of maps, channels last; so is the gradient, which torch's own would reorder."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: tuple[int, int]) -> Tensor:
        ctx.size, ctx.stride = x.shape, stride
        return x[:, :, :: stride[0], :: stride[1]].contiguous(memory_format=torch.channels_last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        b, c, h, w = ctx.size
        dx = maps_of(dy.new_zeros(b * h * w, c), b, h, w)
        dx[:, :, :: ctx.stride[0], :: ctx.stride[1]] = dy
        return dx, None


def lora_point(x: Tensor, layer: Layer, geometry: Geometry, now: Ready) -> Tensor:
    """The same for a kernel of 1 x 1; `layer.weight (o, i)` and `now` as `lora_group` takes them."""
    if geometry.stride != (1, 1):
        x = _Every.apply(x, geometry.stride)  # type: ignore[no-untyped-call]
    size = len(x), *x.shape[2:]
    return maps_of(lora_group(rows_of(x), [layer], now)[0], *size)
