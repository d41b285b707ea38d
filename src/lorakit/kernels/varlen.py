"""Attention inside segments on a GPU: torch's flash attention over all of them in one call, gradients too.

It takes half precision, heads of a size that 8 divides, causal or not, a window back, and fewer heads of keys than of
queries; no bias and no softcap. What it does not take runs by length (segments.py).
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lorakit.device import has_varlen, varlen

_GRAIN, _WIDEST = 8, 256  # of a head, by flash attention
_HALF = (torch.bfloat16, torch.float16)
_KNOWN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # starts -> the same on a device, and the longest


def takes(q: Tensor, v: Tensor, bias: Tensor | None, softcap: float) -> bool:
    """Whether these can be attended by it: `q (h, n, d)`, `v (h or fewer, m, d)`."""
    d = q.shape[2]
    return (
        has_varlen(q.device)
        and q.dtype in _HALF
        and d % _GRAIN == 0
        and d <= _WIDEST
        and v.shape[2] == d
        and bias is None
        and not softcap
    )


def attend(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, scale: float, causal: bool, window: int
) -> Tensor:
    """`softmax(scale q k^T) v` inside each segment: `(h, n, d)`; `window` counts the row itself, 0 is all."""
    window_size = (window - 1, 0) if window else (-1, 0 if causal else -1)
    (there_q, most_q), (there_k, most_k) = (_there(starts, q.device) for starts in (q_starts, k_starts))
    rows = (x.transpose(0, 1) for x in (q, k, v))
    y: Tensor = varlen()(
        *(x if x.stride(-1) == 1 else x.contiguous() for x in rows),
        there_q,
        there_k,
        most_q,
        most_k,
        scale=scale,
        window_size=window_size,
        enable_gqa=q.shape[0] != k.shape[0],
    )
    return y.transpose(0, 1)


def _there(starts: Tensor, device: torch.device) -> tuple[Tensor, int]:
    """Where segments begin, int32 on the device, and the longest: once for all layers of a pass."""
    if starts not in _KNOWN or _KNOWN[starts][0].device != device:
        _KNOWN[starts] = starts.to(device, torch.int32), int(starts.diff().max())
    found: tuple[Tensor, int] = _KNOWN[starts]
    return found
