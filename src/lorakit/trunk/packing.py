"""Rows without padding: several texts in one sequence, through Transformers' own extension point.

Transformers lets an attention function be registered by name. Ours reads from the running context where each text
begins, so that no model has to hand it through; a name without a mask function gets no mask, so none is made.

T5 and its kin make a bias for every pair of rows and hand it from block to block. It depends on their distance only, so
while the model is packed `compute_bias` gives it once for each distance in the longest text; their cross-attention,
which has none, makes a bias of zeros for every pair, and is given an empty one instead. BART and its kin count
positions from the start of a row; while packed, from the start of each text.

A decoder's attention that is not causal looks at what was encoded (`Segments.sources`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.kernels.segments import Asking, Scores, segment_attention
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
        self.caught: tuple[Tensor, Tensor, Tensor, Scores] | None = None


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
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: `query (b, h, n, d)` -> `(b, n, h, d)`.

    The b n rows are those of the running segments; where there are several for each, as patches of an image, these stay
    together.
    """
    few, now = _FEW.get(), current()
    strange = [name for name, value in others.items() if value is not None and name not in _HARMLESS]
    if now is None or strange or attention_mask is not None or dropout:
        raise CannotPackError(f"its attention asks for {', '.join(strange) or 'a mask or dropout'}")
    now.n_calls[0] += 1
    if few is not None and not len(few.rows):
        return query.transpose(1, 2), None  # nobody reads it
    before = now.before
    if few is not None and few.caught is not None:
        q, k, v, scores = few.caught
        starts, places = now.starts, few.asking.places
        if before is not None and places is not None:
            starts, places = before.starts, places + len(before.states)
        y = segment_attention(q[:, few.rows.to(q.device)], k, v, starts, scores, Asking(few.asking.starts, places))
        return y.transpose(0, 1).unsqueeze(0), None
    b, _, n, d = query.shape
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    scale = d**-0.5 if scaling is None else scaling
    if position_bias is not None and not position_bias.numel():
        position_bias = None
    if now.sources is not None and not causal:
        return _across(query, key, value, now, now.sources, Scores(scale, bias=position_bias)), None
    each, rest = divmod(b * n, now.n_tokens)
    if key.shape[2] != n or rest:
        raise CannotPackError("its attention looks at other rows than its own")
    if position_bias is not None and position_bias.ndim != 2:
        raise CannotPackError("its attention adds a bias for each pair of rows")
    if sliding_window and not causal:
        raise CannotPackError("its attention looks through a window to both sides")
    scores = Scores(scale, causal, sliding_window or 0, softcap or 0.0, position_bias)
    q, k, v = (x.transpose(0, 1).flatten(1, 2) for x in (query, key, value))
    asking: Asking | None = None
    if before is not None:
        if position_bias is not None or not hasattr(module, "layer_idx"):
            raise CannotPackError("its attention takes no keys in front of a text")
        k, v = before.joined(module.layer_idx, k, v)  # type: ignore[arg-type]
        asking = Asking(now.starts, before.places if causal else None)
    if few is not None:
        few.caught = q, k, v, scores
        raise CaughtError
    starts = before.starts if before is not None else now.starts if each == 1 else now.starts * each
    y = segment_attention(q, k, v, starts, scores, asking)
    return y.transpose(0, 1).reshape(b, n, *y.shape[::2]), None


def _across(query: Tensor, key: Tensor, value: Tensor, now: Segments, sources: Segments, scores: Scores) -> Tensor:
    """Cross-attention: the rows of each segment look at those of its source."""
    if (query.shape[2], key.shape[2]) != (now.n_tokens, sources.n_tokens) or scores.bias is not None:
        raise CannotPackError("its cross-attention looks at other rows than those of its sources, or adds a bias")
    y = segment_attention(query[0], key[0], value[0], sources.starts, scores, Asking(now.starts))
    return y.transpose(0, 1).unsqueeze(0)


def _bias_by_distance(
    module: Any, query_length: int, key_length: int, device: torch.device | None = None, past_seen_tokens: int = 0
) -> Tensor:
    """T5's bias for all distances in the longest text of m rows, from `1 - m` to `m - 1`: `(h, 2 m - 1)`."""
    plain: Callable[..., Tensor] = type(module).compute_bias
    now = current()
    if now is None:
        return plain(module, query_length, key_length, device, past_seen_tokens)
    m = int(now.lengths.max())
    return plain(module, 1, 2 * m - 1, device, m - 1)[0, :, 0].float()


def _no_bias(*_: Any, **__: Any) -> Tensor:
    return torch.empty(0, 0)


def _positions(module: Any, *args: Any, **given: Any) -> Tensor:
    """The embedding of the place of each row in its text, `(1, rows, d)`."""
    now = current()
    if now is None:
        plain: Tensor = type(module).forward(module, *args, **given)
        return plain
    by_hand = not isinstance(module, nn.Embedding)  # M2M100's table is a buffer, and begins behind its padding
    table: Tensor = module.weights if by_hand else module.weight
    offset = module.padding_idx + 1 if by_hand else getattr(module, "offset", 0)
    longest = max(now.lengths[:-1].tolist(), default=0)
    if longest + offset > len(table):
        raise IndexError(f"a text of {longest} tokens, where the model has {len(table) - offset} positions")
    places = (now.positions() + offset).clamp(max=len(table) - 1)  # rows of padding, the last, may be more than that
    return nn.functional.embedding(places.to(table.device), table)[None]


@contextmanager
def _by_segment(model: nn.Module) -> Iterator[None]:
    """Within the block, T5's attention makes its bias by distance, and BART's positions are those in each text.

    CannotPackError if the bias learns.
    """
    makers = [m for m in model.modules() if hasattr(m, "compute_bias")]
    owners = [m for m in makers if hasattr(m, "relative_attention_bias")]
    if any(p.requires_grad for module in owners for p in module.get_submodule("relative_attention_bias").parameters()):
        raise CannotPackError("its position bias learns, and packed rows take it as a constant")
    plain = [m for m in makers if getattr(m, "has_relative_attention_bias", None) is False]
    counted = [m for m in model.modules() if _counts_rows(m)]
    for module in owners:
        module.__dict__["compute_bias"] = partial(_bias_by_distance, module)
    for module in plain:
        module.__dict__ |= {"compute_bias": _no_bias, "has_relative_attention_bias": True}
    for module in counted:
        module.__dict__["forward"] = partial(_positions, module)
    try:
        yield
    finally:
        for module in makers:
            module.__dict__.pop("compute_bias", None)
        for module in plain:
            module.__dict__["has_relative_attention_bias"] = False
        for module in counted:
            del module.__dict__["forward"]


def _counts_rows(module: nn.Module) -> bool:
    """A table of positions that makes the places by itself, and that nothing was attached to."""
    table = isinstance(module, nn.Embedding) or {"weights", "padding_idx"} <= {*module._buffers, *module.__dict__}
    named = type(module).__name__.endswith("PositionalEmbedding")
    return named and table and not module._modules and "forward" not in module.__dict__


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
        with _by_segment(model):
            yield
    finally:
        model.set_attn_implementation(before)  # type: ignore[operator]
        if cache is not None:
            config.use_cache = cache
