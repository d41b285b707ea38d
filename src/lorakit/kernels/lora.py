"""Linear layers that read one input, and their pairs: `y_k = gain_k (W_k x + scale_k b_k (a_k x)) + bias_k`, by hand.

One autograd function for a single layer and for a group (q, k, v; gate, up). What it saves against the plain
composition: no `(n, o)` temporary for the pair (it is added in place), no scaled copy, no separate input gradients to
add up, and for the backward only `x` (once for the group; not at all where every a is frozen) and the thin
`s = x a^T`. All `a` of a group make one product.

In float32 on a CPU two of the six thin products are saved by merging: `W + scale * b a` is made in the forward and
again in the backward (nothing of its size is kept), which is less work once `n (i + o) > 2 i o`. Not in half precision:
rounding the sum would lose most of a small delta.

Factors are masters, usually float32; they are cast to the dtype of `x`, or were already (`Ready`), and their gradients
are cast back. The rank is padded with zeros to a multiple of 16 (8 in half precision on a CPU): narrower products run
slower.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.kernels.gains import gain_gradients
from lorakit.kernels.products import Coded, Packed, dense, input_gradient, linear
from lorakit.kernels.thin import Into, add_pairs, pair_gradients

_PAD = {torch.bfloat16: 8, torch.float32: 16, torch.float64: 16}  # on a CPU
_PAD_GPU = {torch.bfloat16: 16, torch.float16: 16}  # what matrix units take at once


class Ready(NamedTuple):
    """Factors of a group as the products take them: `a (sum of r, i)`; each `b` transposed, `(r, o)`, its scale in it.

    `into` are windows for the gradients of each `a (r, i)` and `b (o, r)`, None for what is frozen. Where they are
    given the backward adds to them, and autograd gets none: the casts and copies on its way are as many as the
    products. `gains` are windows for the gradients of gains.
    """

    a: Tensor
    b: tuple[Tensor, ...]
    into: tuple[Into, ...] = ()
    gains: tuple[Tensor | None, ...] = ()


class Layer(NamedTuple):
    """One layer of a group. `weight (o, i)`, `bias (o,)` or None, `a (r, i)`, `b (o, r)`, `gain (o,)` or None."""

    weight: Tensor | Coded
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float
    gain: Tensor | None = None
    packed: Packed | None = None


def padded_rank(rank: int, device: torch.device, dtype: torch.dtype) -> int:
    """The rank as the products take it."""
    return rank + -rank % (_PAD if device.type == "cpu" else _PAD_GPU).get(dtype, 1)


def ready(pairs: Sequence[tuple[Tensor, Tensor, float]], dtype: torch.dtype) -> Ready:
    """Factors cast, padded and joined; the scale goes into `b`."""
    wide_a, wide_b = [], []
    for a, b, scale in pairs:
        short = padded_rank(a.shape[0], a.device, dtype) - a.shape[0]
        wide_a.append(F.pad(a.to(dtype), (0, 0, 0, short)) if short else a.to(dtype))
        b = b.T.to(dtype) if scale == 1 else (b.T * scale).to(dtype)
        wide_b.append(F.pad(b, (0, 0, 0, short)) if short else b)
    return Ready(wide_a[0] if len(wide_a) == 1 else torch.cat(wide_a), tuple(wide_b))


def _pays_to_merge(x: Tensor, weights: Sequence[Tensor | Coded]) -> bool:
    if x.dtype not in (torch.float32, torch.float64) or x.device.type != "cpu":
        return False
    outs, i = sum(w.shape[0] for w in weights), x.shape[1]
    return x.shape[0] * (i + outs) > 2 * i * outs


def _merged(weights: Sequence[Tensor | Coded], now: Ready, gains: Sequence[Tensor | None]) -> Tensor:
    """All `gain (W + scale b a)` of the group in one new matrix (sum of o, i)."""
    whole = torch.empty(sum(w.shape[0] for w in weights), weights[0].shape[1], dtype=now.a.dtype)
    row = column = 0
    for weight, b, gain in zip(weights, now.b, gains):
        r, o = b.shape
        part = whole[row : row + o]
        torch.addmm(dense(weight, now.a.dtype), b.T, now.a[column : column + r], out=part)
        if gain is not None:
            part.mul_(gain[:, None])
        row, column = row + o, column + r
    return whole


class _Group(torch.autograd.Function):
    """Inputs: x, (scales, Ready or None, packed weights), then for each layer weight, bias, a, b, gain."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, how: Any, *tensors: Any) -> Any:
        scales, given, packed = how
        weights, biases, a, b, gains = (tensors[k::5] for k in range(5))
        now = given or ready(list(zip(a, b, scales)), x.dtype)
        ctx.merges = _pays_to_merge(x, weights)
        if ctx.merges:
            s, sizes = linear(x, now.a), [w.shape[0] for w in weights]
            parts = linear(x, _merged(weights, now, gains), _joined_bias(biases, sizes, x)).split_with_sizes(sizes, 1)
        else:
            parts, s = _computed(x, weights, biases, gains, packed, now)
        kept = [(y, bias) if gain is not None else (None, None) for y, bias, gain in zip(parts, biases, gains)]
        held = [w if isinstance(w, Tensor) else None for w in weights]
        needs = ctx.needs_input_grad
        seen = x if any(needs[4::5]) or any(needs[2::5]) else None  # frozen a and W teach nothing about x
        ctx.save_for_backward(seen, s, *held, *a, *b, *gains, *(t for pair in kept for t in pair))
        ctx.scales, ctx.given, ctx.packed = scales, given, packed
        ctx.coded = [None if isinstance(w, Tensor) else w for w in weights]
        return parts if len(parts) > 1 else parts[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, s, *rest = ctx.saved_tensors
        n = len(dys)
        weights = [coded or weight for coded, weight in zip(ctx.coded, rest[:n])]
        a, b, gains, kept = rest[n : 2 * n], rest[2 * n : 3 * n], rest[3 * n : 4 * n], rest[4 * n :]
        now = ctx.given or ready(list(zip(a, b, ctx.scales)), s.dtype)
        needs = [ctx.needs_input_grad[5 * k + 2 : 5 * k + 7] for k in range(n)]
        into_gains = now.gains or tuple(torch.zeros_like(g) if need[4] else None for g, need in zip(gains, needs))
        given = dys
        dys = tuple(
            dy if gain is None else gain_gradients(dy, y, gain, bias, dgain)
            for dy, gain, y, bias, dgain in zip(dys, gains, kept[::2], kept[1::2], into_gains)
        )
        dx = None
        if ctx.needs_input_grad[0] and ctx.merges:
            dx = input_gradient(_joined(given), _merged(weights, now, gains))
        elif ctx.needs_input_grad[0]:
            for dy, weight, packed in zip(dys, weights, ctx.packed):
                dx = input_gradient(dy, weight, packed, dx)
        into: Sequence[Into] = now.into or [
            (torch.zeros_like(one) if need[2] else None, torch.zeros_like(two) if need[3] else None)
            for one, two, need in zip(a, b, needs)
        ]
        pair_gradients(x, s, now.a, now.b, dys, into, ctx.scales, None if ctx.merges else dx)
        grads: list[Tensor | None] = [dx, None]
        for dy, up, need, new, dgain in zip(dys, given, needs, into, into_gains):
            frozen = dy.T @ x if need[0] else None, up.sum(0) if need[1] else None
            grads += [*frozen, *((None, None, None) if now.into else (*new, dgain))]
        return tuple(grads)


def _computed(
    x: Tensor,
    weights: Sequence[Tensor | Coded],
    biases: Sequence[Tensor | None],
    gains: Sequence[Tensor | None],
    packed: Sequence[Packed | None],
    now: Ready,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The outputs, and the thin `s`."""
    inner = [bias if gain is None else None for bias, gain in zip(biases, gains)]
    parts = tuple(linear(x, *one) for one in zip(weights, inner, packed))
    return parts, add_pairs(x, now.a, now.b, parts, gains, biases)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Matrices side by side: the one they are columns of, if they are; else a copy."""
    first, total = parts[0], sum(part.shape[1] for part in parts)
    if len(parts) == 1:
        return first
    place, size = first.data_ptr(), first.element_size()
    for part in parts:
        if part.data_ptr() != place or part.stride() != (total, 1):
            return torch.cat(list(parts), 1)
        place += part.shape[1] * size
    return first.as_strided((first.shape[0], total), (total, 1))


def _joined_bias(biases: Sequence[Tensor | None], sizes: Sequence[int], x: Tensor) -> Tensor | None:
    if len(biases) == 1 or all(bias is None for bias in biases):
        return biases[0]
    return torch.cat([x.new_zeros(size) if bias is None else bias for bias, size in zip(biases, sizes)])


def lora_group(x: Tensor, layers: Sequence[Layer], now: Ready | None = None) -> tuple[Tensor, ...]:
    """The output of every layer, for `x (.., i)`; see the module. `now` spares the casts where they are at hand."""
    flat = x.reshape(-1, x.shape[-1])
    scales, packed = [layer.scale for layer in layers], [layer.packed for layer in layers]
    if torch.is_grad_enabled() and (
        x.requires_grad or any(t is not None and t.requires_grad for layer in layers for t in _tensors(layer))
    ):
        tensors = [t for layer in layers for t in _tensors(layer)]
        found = _Group.apply(flat, (scales, now, packed), *tensors)  # type: ignore[no-untyped-call]
        parts = found if len(layers) > 1 else (found,)
    else:
        now = now or ready([layer[2:5] for layer in layers], x.dtype)
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        parts, _ = _computed(flat, weights, biases, [layer.gain for layer in layers], packed, now)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in parts)


def _tensors(layer: Layer) -> tuple[Any, ...]:
    return (*layer[:4], layer.gain)


def lora_linear(x: Tensor, weight: Tensor | Coded, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`F.linear(x, weight, bias) + scale * (x a^T) b^T` for `x (.., i)`, `weight (o, i)`, `a (r, i)`, `b (o, r)`.

    >>> import torch
    >>> x, w, a, b = torch.randn(5, 4), torch.randn(3, 4), torch.randn(2, 4), torch.randn(3, 2)
    >>> torch.allclose(lora_linear(x, w, None, a, b, 0.5), x @ (w + 0.5 * b @ a).T, atol=1e-5)
    True
    """
    return lora_group(x, [Layer(weight, bias, a, b, scale)])[0]
