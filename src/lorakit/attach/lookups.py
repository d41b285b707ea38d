"""Rows that an embedding gives, with their low-rank part by itself, for kernels that need no more than its factors."""

import torch
from torch import Tensor, nn

from lorakit.attach.slots import Slot, WeightReader
from lorakit.kernels.pairs import Rows


def looked_up(layer: nn.Embedding, places: Tensor) -> Rows:
    """`layer(places)`, for places `(n,)`: in parts where nothing but one plain pair changes it; else whole."""
    slot = layer._modules.get("adapters")
    slot = slot if isinstance(slot, Slot) and _alone(layer, slot) else None
    active = slot.active() if slot else []
    pair = None
    if slot and len(active) == 1 and active[0].method.exact_pair:
        pair = active[0].pair(WeightReader(layer, "weight", slot.kind))
    if pair is None:
        return Rows(layer(places))
    w = nn.functional.embedding(places, layer.weight)
    return Rows(w, torch.index_select(pair.a, 1, places).T, pair.b, pair.scale)


def _alone(layer: nn.Embedding, slot: Slot) -> bool:
    """Its hook is all that a call would run beside the layer itself, and padding, which teaches nothing, is none."""
    hooks = len(layer._forward_hooks) == 1 and not layer._forward_pre_hooks
    own = hooks and list(layer._modules) == ["adapters"] and type(layer) is nn.Embedding
    return slot.drive == "hook" and own and layer.padding_idx is None
