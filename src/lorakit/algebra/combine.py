"""combine: several adapters become one, exactly where the way to do it is a sum, and never in the size of the weights.

All deltas of a layer lie between common bases of theirs, `u (o, R)` and `v (i, R)` with R the sum of their ranks: there
each is an R x R matrix, losslessly, whatever its rank, scale and gauge (merging in core space, NeurIPS 2025). What is
made of these matrices is the new delta between the same bases.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lorakit.adapter import Adapter, Known, same_base
from lorakit.algebra.merges import RULES, How, check_how, rule_of
from lorakit.algebra.truncate import truncate
from lorakit.errors import BaseMismatchError, PlanError, UsageError, listed, nearest
from lorakit.method import METHODS, layer_update
from lorakit.update import AdaptedLayer, Update, same_tensor

_ZERO = 1e-7  # of the largest singular value: smaller ones are rounding
Parts = list[tuple[float, Update]]


def combine(
    adapters: Mapping[str, tuple[Adapter, float]],
    how: str = "linear",
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    budget: int | None = None,
    keep: float | None = None,
    density: float = 0.5,
    sign: str = "total",
    seed: int = 0,
    trained: str = "",
) -> Adapter:
    """One adapter of several, each with its weight: `combine({"en": (one, 0.7), "law": (other, 0.3)})`.

    `how`: "linear", the weighted sum of all deltas, exact, of as small a rank as that can have (a negative weight takes
    away, weights `1 - t` and `t` go from the one to the other); "ties", "dare_linear", "dare_ties", "magnitude_prune"
    by `density`, `sign` and `seed` (`lorakit.algebra.merges`), on the deltas between common bases. With "_svd" behind
    its name a rule works on the numbers of the whole deltas, as its paper has it, and the result is truncated to the
    largest rank among the adapters if nothing else is asked for. "cat" and "svd" are PEFT's names of the sum, whole and
    truncated. `rank`, `energy`, `error`, `budget` and `keep` truncate the result (see `truncate`).

    Adapters may have other ranks, scales, layers and methods, if those are low-rank pairs. Parameters that they trained
    whole (heads) do not add up: `trained` is "mean" (weighted), "none", or the name of the adapter whose are kept; it
    must be given where they differ. Raises UsageError, PlanError for other methods, BaseMismatchError for adapters of
    different bases.

    >>> import torch, lorakit as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 9))
    >>> one, two = (lk.init(model, lk.plan(model, rank=r), seed=r) for r in (2, 3))
    >>> lk.combine({"one": (one, 1.0), "two": (two, -0.5)})
    Adapter(lora, 1 layers, rank 1, 15 numbers, 0.00 MB)
    """
    name, whole = rule_of(how)
    check_how(density, sign)
    _refuse(adapters)
    asked = {"rank": rank, "energy": energy, "error": error, "budget": budget, "keep": keep}
    if (whole or how == "svd") and all(value is None for value in asked.values()):
        asked["rank"] = max((x.rank for a, _ in adapters.values() for x in a.layers.values()), default=1)
    rule, by = RULES[name], How(density, sign, torch.Generator().manual_seed(seed))
    layers = {}
    for path in dict.fromkeys(path for adapter, _ in adapters.values() for path in adapter.layers):
        parts = [(weight, layer_update(a.layers[path])) for a, weight in adapters.values() if path in a.layers]
        first = next(a.layers[path] for a, _ in adapters.values() if path in a.layers)
        bases = None if whole else _bases([update for _, update in parts])
        stack = torch.stack([_between(update, bases) for _, update in parts])
        made = rule(stack, torch.tensor([weight for weight, _ in parts], dtype=stack.dtype), by)
        layers[path] = _layer(first, made, bases, parts)
    meta = {**_common_meta(adapters), "combined": {"how": how, "of": {key: w for key, (_, w) in adapters.items()}}}
    meta["bases"] = _known(adapters)
    result = Adapter(layers, _trained(adapters, trained), meta)
    return truncate(result, **asked) if any(value is not None for value in asked.values()) else result  # type: ignore[arg-type]


def _refuse(adapters: Mapping[str, tuple[Adapter, float]]) -> None:
    """What cannot be combined."""
    if not adapters:
        raise UsageError("there is nothing to combine; give one adapter or more, each with a weight")
    shapes: dict[str, tuple[str, AdaptedLayer]] = {}
    for name, (adapter, weight) in adapters.items():
        if not torch.isfinite(torch.tensor(float(weight))):
            raise UsageError(f"the weight of '{name}' is {weight}; it must be a number")
        if adapter.prompt is not None:
            raise PlanError(f"'{name}' has a prompt, and prompts do not add up: attach and activate both adapters")
        others = [f"'{path}' is {x.method}" for path, x in adapter.layers.items() if not METHODS[x.method].exact_pair]
        if others:
            raise PlanError(f"only low-rank pairs can be combined; of '{name}' {listed(others, 4)}")
        for path, layer in adapter.layers.items():
            whose, known = shapes.setdefault(path, (name, layer))
            if (known.shape, known.groups) != (layer.shape, layer.groups):
                raise BaseMismatchError(f"'{path}' is {known.shape} in '{whose}' and {layer.shape} in '{name}'")


def _bases(updates: Sequence[Update]) -> tuple[Tensor, Tensor]:
    """Orthonormal `u (.., o, R)` and `v (.., i, R)` that all deltas lie between."""
    b = torch.cat([_double(update.b) for update in updates], -1)
    a = torch.cat([_double(update.a) for update in updates], -2)
    return torch.linalg.qr(b)[0], torch.linalg.qr(a.mT)[0]


def _between(update: Update, bases: tuple[Tensor, Tensor] | None) -> Tensor:
    """The delta between the bases; without any the whole of it."""
    b, a = _double(update.b), _double(update.a)
    if bases is None:
        return update.scale * (b @ a)
    u, v = bases
    return update.scale * ((u.mT @ b) @ (a @ v))


def _layer(first: AdaptedLayer, made: Tensor, bases: tuple[Tensor, Tensor] | None, parts: Parts) -> AdaptedLayer:
    """Plain LoRA of the smallest rank that loses nothing, singular values shared evenly."""
    u, s, vh = torch.linalg.svd(made, full_matrices=False)
    top = float(s.max()) if s.numel() else 0.0
    rank = max(1, int((s.reshape(-1, s.shape[-1]) > _ZERO * top).sum(-1).max())) if top else 1
    root = s[..., :rank].sqrt()
    b, a = u[..., :rank] * root.unsqueeze(-2), root.unsqueeze(-1) * vh[..., :rank, :]
    if bases is not None:
        b, a = bases[0] @ b, a @ bases[1].mT
    dtype = torch.promote_types(parts[0][1].a.dtype, torch.float32)  # type: ignore[union-attr]
    factors = {"a": a.to(dtype).contiguous(), "b": b.to(dtype).contiguous()}
    biases = [weight * update.bias for weight, update in parts if update.bias is not None]
    if biases:
        factors["bias"] = torch.stack(biases).sum(0)
    return replace(first, method="lora", factors=factors, rank=rank, scale=1.0, start="combined")


def _double(factor: Tensor | None) -> Tensor:
    assert factor is not None
    return factor.detach().double()


def _trained(adapters: Mapping[str, tuple[Adapter, float]], way: str) -> dict[str, Tensor]:
    """The parameters that are whole in the result."""
    names = dict.fromkeys(name for adapter, _ in adapters.values() for name in adapter.trained)
    if way == "none" or not names:
        return {}
    if way in adapters:
        return dict(adapters[way][0].trained)
    if way not in ("", "mean"):
        raise UsageError(f"trained is '{way}'{nearest(way, adapters)}; use mean, none, or the name of an adapter")
    found = {}
    for name in names:
        own = {key: (a.trained[name], weight) for key, (a, weight) in adapters.items() if name in a.trained}
        first, _ = next(iter(own.values()))
        if len(own) == len(adapters) and all(same_tensor(first, one) for one, _ in own.values()):
            found[name] = first
            continue
        if not way:
            raise UsageError(
                f"'{name}' was trained whole by {', '.join(own)} and differs, and such parameters do not add up; say "
                "with trained whether to take their mean (mean), that of one adapter (its name), or none"
            )
        total = sum(weight for _, weight in own.values())
        if any(one.shape != first.shape for one, _ in own.values()) or total == 0:
            told = ", ".join(f"{tuple(one.shape)} in '{key}'" for key, (one, _) in own.items())
            raise UsageError(f"'{name}' has no mean: it is {told}, with weights that add up to {total:g}")
        found[name] = sum((weight / total) * one.double() for one, weight in own.values()).to(first.dtype)  # type: ignore[union-attr]
    return found


def _known(adapters: Mapping[str, tuple[Adapter, float]]) -> list[Known]:
    """Everything that is known of the base. BaseMismatchError where it contradicts itself."""
    known: dict[tuple[frozenset[str], bool], tuple[str, Known]] = {}
    for name, (adapter, _) in adapters.items():
        for one in adapter.bases:
            whose, other = known.setdefault((frozenset(one.layers), one.rows), (name, one))
            if not same_base(one.fingerprint, other.fingerprint):
                raise BaseMismatchError(f"'{whose}' and '{name}' were made on different weights, so they do not add up")
    return [one for _, one in known.values()]


def _common_meta(adapters: Mapping[str, tuple[Adapter, float]]) -> dict[str, Any]:
    """What all adapters say alike of where they come from and what they are for."""
    metas = [adapter.meta for adapter, _ in adapters.values()]
    keys = ("base_name", "task", "peft", "quantized")
    return {key: metas[0][key] for key in keys if key in metas[0] and all(m.get(key) == metas[0][key] for m in metas)}
