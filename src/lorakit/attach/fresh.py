"""Fresh factors: a plan and a model -> an adapter that changes nothing yet."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lorakit._version import __version__
from lorakit.adapter import Adapter
from lorakit.describe import Found, locate, walk
from lorakit.errors import PlanError, listed, nearest
from lorakit.measure import refuse_unmeasured
from lorakit.method import METHODS, Factors, Held, Measured, check_plan, settled, sharing
from lorakit.plan import LayerPlan, Plan
from lorakit.prompt import PROMPTS, Prompt, PromptPlan
from lorakit.quantize import quantized_as
from lorakit.reading import Reading, known_by
from lorakit.update import AdaptedLayer, LayerSpec
from lorakit.whole import resolve_trained


def init(model: nn.Module, plan: Plan, *, seed: int = 0, measured: Mapping[str, Measured] | None = None) -> Adapter:
    """An adapter with the plan's fresh factors, float32, on the devices of the weights.

    Every layer draws from a generator of its own (seed and path), always on the CPU: the factors of a layer do not
    depend on the other layers, nor on the device. `measured` is what `lorakit.measure` gives, for starts that look at
    data. Raises PlanError that lists every fault.
    """
    return fresh(model, plan, {path: locate(model, path) for path in plan.layers}, seed, measured or {})


def fresh(
    model: nn.Module,
    plan: Plan,
    found: Mapping[str, Found | None],
    seed: int,
    measured: Mapping[str, Measured],
) -> Adapter:
    """`init` where the layers have been located already."""
    missing = [path for path, place in found.items() if place is None]
    faults = [f"the model has no layer '{path}'{nearest(path, (name for name, _ in walk(model)))}" for path in missing]
    places = {path: place for path, place in found.items() if place is not None}
    faults += check_plan({path: place.spec for path, place in places.items()}, plan.layers)
    if faults:
        raise PlanError(f"the plan does not fit this {type(model).__name__}: {listed(faults)}")
    refuse_unmeasured(plan, measured)
    entries = {path: settled(plan.layers[path]) for path in places}
    common = _common(places, entries, seed)
    layers: dict[str, AdaptedLayer] = {}
    draw = torch.Generator()
    for path, place in places.items():
        entry = entries[path]
        shared = common[entry.method, entry.rank, place.weight.device]
        known = measured.get(path, Measured())
        layers[path] = _layer(place, entry, shared, known, _seeded(draw, seed, path))
    layers = _shared(layers, entries, {path: place.spec for path, place in places.items()})
    weights = ((path, place.numbers) for path, place in places.items())
    prompt = None if plan.prompt is None else _prompt(model, plan.prompt.settled(), _seeded(draw, seed, "prompt"))
    meta = {
        "base_name": str(getattr(getattr(model, "config", None), "_name_or_path", "") or ""),
        "base_class": type(model).__name__,
        "base_fingerprint": known_by(model, weights, prompt is not None),
        "seed": seed,
        **({"quantized": dict(how)} if (how := quantized_as(model)) else {}),
        "lorakit": __version__,
    }
    trained = {name: p.detach().clone() for name, p in resolve_trained(model, plan.trained).items()}
    return Adapter(layers, trained, meta, prompt)


def _prompt(model: nn.Module, plan: PromptPlan, generator: torch.Generator) -> Prompt:
    method = PROMPTS[plan.method]
    reading = Reading(model, method.inputs)
    return Prompt(plan.method, reading.sizes, method.init(plan, reading, generator), plan.start)


_Alike = tuple[str, int, torch.device]  # method, rank, where


def _common(places: Mapping[str, Found], entries: Mapping[str, LayerPlan], seed: int) -> dict[_Alike, Factors]:
    """What all layers of a method and rank have in common: drawn once, one tensor on each device."""
    alike: dict[tuple[str, int], list[Found]] = {}
    for path, entry in entries.items():
        alike.setdefault((entry.method, entry.rank), []).append(places[path])
    found: dict[_Alike, Factors] = {}
    for (method, rank), group in alike.items():
        drawn = METHODS[method].common([place.spec for place in group], rank, _seeded(torch.Generator(), seed, method))
        for device in {place.weight.device for place in group}:
            found[method, rank, device] = {name: factor.to(device) for name, factor in drawn.items()}
    return found


def _layer(
    place: Found, entry: LayerPlan, common: Factors, known: Measured, generator: torch.Generator
) -> AdaptedLayer:
    method, spec = METHODS[entry.method], place.spec
    weight = place.weight
    original = place.kind.original(place.module)
    base = Held(place.kind.canonical(place.module, weight.detach()), original, known)
    factors = method.init(spec, entry, base, generator)
    if weight.device.type != "cpu":
        factors = {name: factor.to(weight.device) for name, factor in factors.items()}
    return AdaptedLayer(
        entry.method,
        spec.kind,
        spec.shape,
        {**common, **factors},
        entry.rank,
        entry.scale_value if method.takes_rank else 1.0,
        entry.start,
        spec.groups,
        spec.peculiar,
        (*spec.batch, *spec.matrix),
    )


def _shared(
    layers: Mapping[str, AdaptedLayer], entries: Mapping[str, LayerPlan], specs: Mapping[str, LayerSpec]
) -> dict[str, AdaptedLayer]:
    """The layers with the factors that their plan shares taken from the first that is alike. PlanError if none is."""
    holders = sharing(specs, entries)
    followed = {(holder, name) for (path, name), holder in holders.items() if holder != path}
    for (path, name), holder in holders.items():
        if holder == path and (path, name) not in followed:
            raise PlanError(
                f"'{path}' shares {name} with no other layer: none has its role ('{specs[path].role}') and shape; "
                "leave share out there"
            )
    made = dict(layers)
    one: dict[tuple[str, str, torch.device], Tensor] = {}
    for (path, name), holder in holders.items():
        own = layers[path].factors[name]
        factor = one.setdefault((holder, name, own.device), own)
        made[path] = replace(made[path], factors={**made[path].factors, name: factor})
    return made


def base_fingerprint(model: nn.Module, paths: Iterable[str], prompt: bool = False) -> str:
    """Fingerprint of the base weights at these layer paths; of an adapter with a prompt, of the input rows too."""
    places = ((path, locate(model, path)) for path in paths)
    return known_by(model, ((path, place.numbers) for path, place in places if place is not None), prompt)


def _seeded(generator: torch.Generator, seed: int, path: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{path}".encode(), digest_size=8).digest()
    return generator.manual_seed(int.from_bytes(digest, "big") >> 1)
