"""truncate: every delta by its best approximation of smaller rank, without forming it."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lorakit.adapter import Adapter
from lorakit.algebra.budget import Offer, within_loss, within_size
from lorakit.algebra.spectra import Spectrum, spectrum
from lorakit.errors import PlanError, UsageError, listed, nearest
from lorakit.linalg import energy_rank, product_norm
from lorakit.method import METHODS, layer_update
from lorakit.moments import Moments
from lorakit.update import AdaptedLayer


def truncate(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    budget: int | None = None,
    keep: float | None = None,
    moments: Mapping[str, Moments] | None = None,
) -> Adapter:
    """Best approximation of every delta by a smaller rank (Eckart and Young, 1936).

    Give one of: `rank`, of every layer; `energy`, the share (0..1) of squared singular values that each layer keeps;
    `error`, the relative Frobenius norm (0..1) by which all deltas together may change; `budget`, how many numbers the
    layers may have in all; `keep`, the same as a share (0..1) of now. The last three are one budget: directions of all
    layers stand in one row, by what they are worth for each number, and a layer that nothing is left of falls out.

    With `moments` (of a run, or `lorakit.moments`) a direction is worth what the loss would rise by without it, and
    each layer becomes the matrix of its rank that changes the loss least; `error` and `energy` are then shares of that
    (`error` of its root). Costs O((o + i) r^2) for a layer; the delta is never formed. The result is plain LoRA in the
    balanced gauge; the scale stays, and fully trained parameters too. Layers whose rank is small enough already come
    back as they are. `meta["truncated"]` tells the relative Frobenius `error`, and with moments the `nats` by which the
    loss is foretold to rise. Raises UsageError if not one of them is given, PlanError for methods that are no pair.

    >>> import torch, lorakit as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 9))
    >>> paths = lk.attach(model, lk.plan(model, rank=4))
    >>> lk.truncate(lk.collect(model), rank=2).layers["0"].rank
    2
    """
    goal = _goal(rank=rank, energy=energy, error=error, budget=budget, keep=keep)
    others = [f"'{path}' is {x.method}" for path, x in adapter.layers.items() if not METHODS[x.method].exact_pair]
    if others:
        raise PlanError(f"only low-rank pairs can be truncated: {listed(others, 4)}")
    strange = [path for path in moments or {} if path not in adapter.layers]
    if strange:
        raise UsageError(
            f"moments of '{strange[0]}', which is no layer of the adapter{nearest(strange[0], adapter.layers)}"
        )
    spectra = {path: spectrum(layer, (moments or {}).get(path)) for path, layer in adapter.layers.items()}
    if moments and (unseen := [path for path in spectra if path not in moments]) and goal[0] not in ("rank", "energy"):
        raise UsageError(
            f"no moments of '{unseen[0]}' and {len(unseen) - 1} more layers, whose worth cannot be told beside that of "
            "others; leave the moments out, or truncate by rank or energy"
        )
    ranks = _ranks(spectra, *goal)
    layers = {path: found.truncated(ranks[path]) for path, found in spectra.items() if ranks[path]}
    told: dict[str, object] = {"asked": dict([goal]), "error": _error(adapter, layers)}
    if moments is not None:
        told["nats"] = sum(float(spectra[path].worth[ranks[path] :].sum()) for path in moments)
    meta = {**adapter.meta, "truncated": told}
    if len(layers) < len(spectra):
        meta["bases"] = adapter.bases
    return replace(adapter, layers=layers, meta=meta)


def _goal(**given: float | None) -> tuple[str, float]:
    """The one that is given, and its value."""
    found = {name: value for name, value in given.items() if value is not None}
    if len(found) != 1:
        told = f"; {' and '.join(found)} are given" if found else ""
        raise UsageError(f"give one of {', '.join(given)} to truncate by{told}")
    ((name, value),) = found.items()
    if name in ("rank", "budget"):
        if value < 1 or value != int(value):
            raise UsageError(f"{name} is {value}; it must be a whole number, at least 1")
    elif not (0 < value <= 1 or (name == "error" and value == 0)):
        raise UsageError(f"{name} is {value}; it must be a share above 0 and at most 1")
    return name, value


def _ranks(spectra: Mapping[str, Spectrum], name: str, value: float) -> dict[str, int]:
    """The rank of every layer."""
    if name == "rank":
        return {path: int(value) for path in spectra}
    if name == "energy":
        return {path: _kept(found.each, value) for path, found in spectra.items()}
    offers = {path: Offer(found.worth, found.cost, found.least) for path, found in spectra.items()}
    if name == "error":
        return within_loss(offers, value**2 * sum(float(offer.worth.sum()) for offer in offers.values()))
    now = sum(layer.layer.rank * layer.cost for layer in spectra.values())
    size = int(value) if name == "budget" else math.floor(value * now)
    ranks = within_size(offers, size)
    if not any(ranks.values()):
        fewest = min((offer.cost for offer in offers.values()), default=0)
        raise UsageError(f"{size:,} numbers hold no direction of any layer; the smallest takes {fewest:,} of {now:,}")
    return ranks


def _kept(each: Tensor, energy: float) -> int:
    """The rank that keeps the energy in every expert of a stack."""
    rows = each.sqrt().reshape(-1, each.shape[-1])
    return max([1, *(energy_rank(row, energy) for row in torch.unbind(rows))])


def _error(before: Adapter, layers: Mapping[str, AdaptedLayer]) -> float:
    """Relative Frobenius norm of what all deltas together lost."""
    lost = total = 0.0
    for path, layer in before.layers.items():
        one = layer_update(layer)
        assert one.a is not None and one.b is not None
        total += float((one.scale * product_norm(one.b, one.a)).square().sum())
        if layers.get(path) is not layer:
            b, a = one.b, one.a
            if path in layers:
                two = layer_update(layers[path])
                assert two.a is not None and two.b is not None
                b, a = torch.cat([b, -two.b.to(b.dtype)], -1), torch.cat([a, two.a.to(a.dtype)], -2)
            lost += float((one.scale * product_norm(b, a)).square().sum())
    return math.sqrt(lost / total) if total else 0.0
