"""Rows without padding: several texts in one sequence, through Transformers' own extension point.

Transformers lets an attention function be registered by name. Ours reads from the running context where each text
begins, so that no model has to hand it through; a name without a mask function gets no mask, so none is made.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.attach.kernels.segments import Asking, segment_attention
from lorakit.errors import LorakitError
from lorakit.trunk.segments import Segments, current

NAME = "lorakit_segments"
_FEW: ContextVar["Few | None"] = ContextVar("few", default=None)
_HARMLESS = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "cache_position", "return_dict"}


class CannotPackError(LorakitError):
    """This model asks its attention for something that packed rows do not have; the rows are padded instead."""


class CaughtError(Exception):
    """Ends the first of the two runs of a block of which only a few rows are wanted; see blocks.py."""


class Few:
    """Which rows of a block are wanted, `rows (m,)`, rising; and what its attention was asked about all rows."""

    def __init__(self, rows: Tensor, segments: Segments) -> None:
        self.rows = rows
        starts = torch.searchsorted(rows, segments.starts)
        self.asking = Asking(starts, rows - torch.repeat_interleave(segments.starts[:-1], starts.diff()))
        self.caught: tuple[Tensor, Tensor, Tensor] | None = None


@contextmanager
def only(few: Few) -> Iterator[None]:
    """Within the block, attention first catches what it is asked, then answers for a few rows."""
    token = _FEW.set(few)
    try:
        yield
    finally:
        _FEW.reset(token)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: `query (1, h, n, d)` -> `(1, n, h, d)`."""
    now = current()
    if now is not None:
        now.n_calls[0] += 1
    window = others.pop("sliding_window", None) or 0
    strange = [name for name, value in others.items() if value is not None and name not in _HARMLESS]
    if now is None or strange or attention_mask is not None or query.shape[0] != 1 or dropout:
        raise CannotPackError(f"its attention asks for {', '.join(strange) or 'a mask or dropout'}")
    if key.shape[2] != query.shape[2]:
        raise CannotPackError("its attention looks at other rows than its own")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = query.squeeze(0), key.squeeze(0), value.squeeze(0)
    if window and not causal:
        raise CannotPackError("its attention looks through a window to both sides")
    few = _FEW.get()
    if few is None:
        y = segment_attention(q, k, v, now.starts, scale, bool(causal), None, window)
    elif few.caught is None:
        few.caught = q, k, v
        raise CaughtError
    else:
        whole, k, v = few.caught
        y = segment_attention(whole[:, few.rows], k, v, now.starts, scale, bool(causal), few.asking, window)
    return y.transpose(0, 1).unsqueeze(0), None


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Within the block, the model's attention is ours. CannotPackError if it cannot be set."""
    if not hasattr(model, "set_attn_implementation"):
        raise CannotPackError("it is no Transformers model")
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)
    config: Any = model.config
    before, cache = config._attn_implementation, getattr(config, "use_cache", None)
    try:
        model.set_attn_implementation(NAME)  # type: ignore[operator]
    except Exception as error:
        raise CannotPackError(f"its attention cannot be replaced ({error})") from None
    if cache is not None:
        config.use_cache = False
    try:
        yield
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]
        if cache is not None:
            config.use_cache = cache
