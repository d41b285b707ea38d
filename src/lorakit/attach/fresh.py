"""Fresh factors: a plan and a model -> an adapter that changes nothing yet."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lorakit._version import __version__
from lorakit.adapter import Adapter, fingerprint
from lorakit.describe import Found, locate, walk
from lorakit.errors import PlanError, listed, nearest
from lorakit.method import METHODS, Held, check_plan, settled
from lorakit.plan import LayerPlan, Plan
from lorakit.update import AdaptedLayer
from lorakit.whole import resolve_trained


def init(model: nn.Module, plan: Plan, *, seed: int = 0) -> Adapter:
    """An adapter with the plan's fresh factors, float32, on the devices of the weights.

    Every layer draws from a generator of its own (seed and path), always on the CPU: the factors of a layer do not
    depend on the other layers, nor on the device. Raises PlanError that lists every fault.
    """
    return fresh(model, plan, {path: locate(model, path) for path in plan.layers}, seed)


def fresh(model: nn.Module, plan: Plan, found: Mapping[str, Found | None], seed: int) -> Adapter:
    """`init` where the layers have been located already."""
    missing = [path for path, place in found.items() if place is None]
    faults = [f"the model has no layer '{path}'{nearest(path, (name for name, _ in walk(model)))}" for path in missing]
    places = {path: place for path, place in found.items() if place is not None}
    faults += check_plan({path: place.spec for path, place in places.items()}, plan.layers)
    if faults:
        raise PlanError(f"the plan does not fit this {type(model).__name__}: {listed(faults)}")
    draw = torch.Generator()
    layers = {path: _layer(place, plan.layers[path], _seeded(draw, seed, path)) for path, place in places.items()}
    layers = _shared(layers, plan, places)
    for method in {layer.method for layer in layers.values()}:
        own = {path: layer for path, layer in layers.items() if layer.method == method}
        layers |= METHODS[method].unite(own, _seeded(draw, seed, method))
    meta = {
        "base_name": str(getattr(getattr(model, "config", None), "_name_or_path", "") or ""),
        "base_class": type(model).__name__,
        "base_fingerprint": fingerprint((path, place.weight) for path, place in places.items()),
        "seed": seed,
        "lorakit": __version__,
    }
    return Adapter(layers, {name: p.detach().clone() for name, p in resolve_trained(model, plan.trained).items()}, meta)


def _layer(place: Found, entry: LayerPlan, generator: torch.Generator) -> AdaptedLayer:
    method, spec, entry = METHODS[entry.method], place.spec, settled(entry)
    weight = place.weight
    base = Held(place.kind.canonical(place.module, weight.detach()))
    factors = method.init(spec, entry, base, generator)
    if weight.device.type != "cpu":
        factors = {name: factor.to(weight.device) for name, factor in factors.items()}
    return AdaptedLayer(
        entry.method,
        spec.kind,
        spec.shape,
        factors,
        entry.rank,
        entry.scale_value if method.takes_rank else 1.0,
        entry.start,
        spec.groups,
        spec.peculiar,
        (*spec.batch, *spec.matrix),
    )


def _shared(layers: Mapping[str, AdaptedLayer], plan: Plan, places: Mapping[str, Found]) -> dict[str, AdaptedLayer]:
    """The layers with the factors that their plan shares taken from the first that is alike. PlanError if none is."""
    first: dict[tuple[object, ...], tuple[str, Tensor]] = {}
    made = dict(layers)
    alone: dict[str, list[str]] = {}
    for path, layer in layers.items():
        for name in plan.layers[path].shared:
            own, role = layer.factors[name], places[path].spec.role
            alike = (plan.layers[path].share, layer.method, role, name, tuple(own.shape), own.device)
            holder, factor = first.setdefault(alike, (path, own))
            if holder == path:
                alone[path] = [*alone.get(path, []), name]
            else:
                alone.pop(holder, None)
                made[path] = replace(made[path], factors={**made[path].factors, name: factor})
    if alone:
        path, names = next(iter(alone.items()))
        raise PlanError(
            f"'{path}' shares {' and '.join(names)} with no other layer: none has its role "
            f"('{places[path].spec.role}') and shape; leave share out there"
        )
    return made


def base_fingerprint(model: nn.Module, paths: Iterable[str]) -> str:
    """Fingerprint of the base weights at these layer paths."""
    places = ((path, locate(model, path)) for path in paths)
    return fingerprint((path, place.weight) for path, place in places if place is not None)


def _seeded(generator: torch.Generator, seed: int, path: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{path}".encode(), digest_size=8).digest()
    return generator.manual_seed(int.from_bytes(digest, "big") >> 1)
