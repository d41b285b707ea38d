"""Loss of an output head on the rows that have a label, in chunks: never all logits at once, in training or evaluation.

For a head that does not learn, the gradient of the hidden states is made in the forward, chunk by chunk, while the
logits are there; the backward only scales it. Rows without a label are not given to it.
"""

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.kernels.native import library
from lorakit.kernels.products import input_gradient, linear

_LOGITS = 1 << 23  # logits at once: 16 MiB in half precision
_WIDER = 8  # times as many on a GPU, whose matrix units want more rows
_KNOWN = (torch.float32, torch.bfloat16)
_LONG = ctypes.c_int64


def rows_at_once(n_outputs: int) -> int:
    """Rows of a chunk for a head with so many outputs."""
    return max(32, min(512, _LOGITS // n_outputs // 32 * 32))


def label_losses(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
    """Cross-entropy of every row in nats `(n,)`, float32: `hidden (n, d)`, `weight (o, d)`, `labels (n,)`, `bias (o,)`.

    The head may learn too (`weight` or `bias` requires a gradient); then its logits are kept as autograd keeps them.
    """
    if any(t is not None and t.requires_grad for t in (weight, bias)):
        return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, reduction="none")
    losses: Tensor = _LabelLosses.apply(hidden, weight, labels, bias)  # type: ignore[no-untyped-call]
    return losses


@torch.no_grad()
def label_scores(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
    """Loss of every row, and 1 where its label has the largest logit: `(n, 2)`, float32."""
    found = [
        torch.stack(_chunk(linear(rows, weight, bias), part, gradient=False), 1)
        for rows, part in _chunks(hidden, weight, labels)
    ]
    return torch.cat(found) if found else torch.zeros(0, 2, device=hidden.device)


def _chunks(hidden: Tensor, weight: Tensor, labels: Tensor) -> Any:
    if len(hidden) != len(labels):
        raise ValueError(f"{len(hidden)} states and {len(labels)} labels")
    size = rows_at_once(weight.shape[0]) * (_WIDER if weight.device.type == "cuda" else 1)
    return zip(torch.split(hidden, size), torch.split(labels.to(hidden.device), size))


class _LabelLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
        needed = ctx.needs_input_grad[0]
        losses, parts = [], []
        for rows, part in _chunks(hidden, weight, labels):
            logits = linear(rows, weight, bias)
            losses.append(_chunk(logits, part, gradient=needed)[0])
            if needed:
                parts.append(input_gradient(logits, weight))
        if needed:
            ctx.save_for_backward(torch.cat(parts) if parts else torch.zeros_like(hidden))
        return torch.cat(losses) if losses else torch.zeros(0, device=hidden.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * dlosses.to(gradient.dtype)[:, None], None, None, None


def _chunk(logits: Tensor, labels: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor]:
    """Loss of each row, and whether its label is the first largest; `logits` become their gradient if asked for."""
    if logits.device.type != "cpu" or logits.dtype not in _KNOWN or library() is None:
        return _chunk_by_torch(logits, labels, gradient=gradient)
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise IndexError(f"a label is outside 0 .. {logits.shape[1] - 1}")
    loss, right = torch.empty(len(logits)), torch.empty(len(logits))
    labels = labels.contiguous()
    places = (loss.data_ptr(), right.data_ptr())
    library().labels_loss(  # type: ignore[union-attr]
        ctypes.c_void_p(logits.data_ptr()),
        *map(_LONG, (logits.shape[0], logits.shape[1], logits.stride(0))),
        ctypes.c_void_p(labels.data_ptr()),
        *map(ctypes.c_void_p, places),
        int(gradient),
        int(logits.dtype == torch.bfloat16),
    )
    return loss, right


def _chunk_by_torch(logits: Tensor, labels: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor]:
    wide = logits.float()
    own = wide.gather(1, labels[:, None])
    right = (wide.argmax(1) == labels).float()
    shift = wide.logsumexp(1, keepdim=True)
    if gradient:
        soft = (wide - shift).exp_()
        soft.scatter_add_(1, labels[:, None], torch.full_like(own, -1.0))
        logits.copy_(soft)
    return (shift - own)[:, 0], right
