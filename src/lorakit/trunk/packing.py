"""Rows without padding: several texts in one sequence, through Transformers' own extension point.

Transformers lets an attention function be registered by name. Ours reads from the running context where each text
begins, so that no model has to hand it through; a name without a mask function gets no mask, so none is made.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lorakit.attach.kernels.segments import segment_attention
from lorakit.errors import LorakitError
from lorakit.trunk.segments import current

NAME = "lorakit_segments"
_HARMLESS = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "cache_position", "return_dict"}


class CannotPackError(LorakitError):
    """This model asks its attention for something that packed rows do not have; the rows are padded instead."""


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
    strange = [name for name, value in others.items() if value is not None and name not in _HARMLESS]
    if now is None or strange or attention_mask is not None or query.shape[0] != 1 or dropout:
        raise CannotPackError(f"its attention asks for {', '.join(strange) or 'a mask or dropout'}")
    if key.shape[2] != query.shape[2]:
        raise CannotPackError("its attention looks at other rows than its own")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    y = segment_attention(query.squeeze(0), key.squeeze(0), value.squeeze(0), now.starts, scale, bool(causal))
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
