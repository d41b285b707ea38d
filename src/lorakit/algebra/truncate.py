"""truncate: every delta by its best approximation of smaller rank, without forming it."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lorakit.adapter import Adapter
from lorakit.errors import PlanError, UsageError, listed
from lorakit.linalg import energy_rank, product_svd
from lorakit.method import METHODS, layer_update
from lorakit.update import AdaptedLayer


def truncate(adapter: Adapter, *, rank: int | None = None, energy: float | None = None) -> Adapter:
    """Best approximation of every delta by a smaller rank (Eckart and Young, 1936).

    Give `rank`, or `energy`: the kept share of squared singular values (0..1), which leaves each layer a rank of its
    own. Costs O((o + i) r^2) for a layer; the delta is never formed. The result is plain LoRA in the balanced gauge;
    the scale stays, and fully trained parameters too. Layers whose rank is small enough already come back as they are.
    Raises UsageError if both or neither is given, PlanError for methods that are no pair.

    >>> import torch, lorakit as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 9))
    >>> paths = lk.attach(model, lk.plan(model, rank=4))
    >>> lk.truncate(lk.collect(model), rank=2).layers["0"].rank
    2
    """
    if (rank is None) == (energy is None):
        raise UsageError("give either rank or energy to truncate by")
    if rank is not None and rank < 1:
        raise UsageError(f"rank is {rank}; it must be at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"energy is {energy}; it must be a share above 0 and at most 1")
    others = [f"'{path}' is {x.method}" for path, x in adapter.layers.items() if not METHODS[x.method].exact_pair]
    if others:
        raise PlanError(f"only low-rank pairs can be truncated: {listed(others, 4)}")
    layers = {path: _truncated(layer, rank, energy) for path, layer in adapter.layers.items()}
    return replace(adapter, layers=layers, meta={**adapter.meta, "truncated": {"rank": rank, "energy": energy}})


def _truncated(layer: AdaptedLayer, rank: int | None, energy: float | None) -> AdaptedLayer:
    update = layer_update(layer)
    assert update.a is not None and update.b is not None
    if rank is not None and rank >= update.rank:
        return layer
    svd = product_svd(update.b, update.a)
    kept = rank if rank is not None else _kept(svd.s, energy or 1.0)
    b, a = svd.truncated(kept).balanced()
    dtype = update.a.dtype
    factors: Mapping[str, Tensor] = {"a": a.to(dtype).contiguous(), "b": b.to(dtype).contiguous()}
    if "bias" in layer.factors:
        factors = {**factors, "bias": layer.factors["bias"]}
    return replace(layer, method="lora", factors=factors, rank=kept, start="truncated")


def _kept(s: Tensor, energy: float) -> int:
    """The rank that keeps the energy in every expert of a stack."""
    rows = s.reshape(-1, s.shape[-1])
    return max([1, *(energy_rank(row, energy) for row in torch.unbind(rows))])
