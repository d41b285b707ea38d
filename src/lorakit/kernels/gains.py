"""A gain for every column of a layer's output, and its bias: `y = gain * z + bias`, forward in place.

The backward takes `z` back from `y`, so that nothing is kept for it but what others keep anyway; no gain may be near 0
(`fit`). On a CPU one C call each way (native/gains.c).
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.kernels.native import library, place, takes

_LONG = ctypes.c_int64
_LEAST = 2.0**-6  # below it, z taken back from y would be too coarse


def fit(gains: Sequence[Tensor]) -> bool:
    """No gain is so small that its gradient could not be told from the output."""
    return not gains or float(torch.cat(list(gains)).detach().abs().min()) >= _LEAST


def plain(x: Tensor | None) -> Tensor | None:
    """As C takes it: float32, without gaps."""
    return None if x is None else x.detach().float().contiguous()


def add_gain(y: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """`y (n, o)` itself, made `gain * y + bias`."""
    if not takes(y) or y.stride(1) != 1:
        y.mul_(gain)
        return y if bias is None else y.add_(bias)
    own, shift = plain(gain), plain(bias)
    library().gain_forward(  # type: ignore[union-attr]
        place(y), _LONG(y.stride(0)), place(own), place(shift), *map(_LONG, y.shape), int(y.dtype == torch.bfloat16)
    )
    return y


def gain_gradients(dy: Tensor, y: Tensor, gain: Tensor, bias: Tensor | None, dgain: Tensor | None) -> Tensor:
    """`gain * dy (n, o)`; the gradient of the gain is added to `dgain (o,)`, float32, if given."""
    straight = dy.stride(1) == 1 and y.stride(1) == 1 and dy.dtype == y.dtype
    if not takes(y) or not straight or (dgain is not None and dgain.dtype != torch.float32):
        if dgain is not None:
            z = y if bias is None else y - bias
            dgain.add_((dy.float() * z).sum(0).to(dgain) / gain)
        return (dy * gain).to(dy.dtype)
    dz, own, shift = torch.empty(y.shape, dtype=y.dtype), plain(gain), plain(bias)
    failed = library().gain_backward(  # type: ignore[union-attr]
        *(place(dy), _LONG(dy.stride(0)), place(y), _LONG(y.stride(0)), place(own), place(shift)),
        *(place(dz), place(dgain), *map(_LONG, y.shape), int(y.dtype == torch.bfloat16)),
    )
    if failed:
        raise MemoryError("no memory for the gains of one layer")
    return dz
