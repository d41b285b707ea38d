"""Where the layers of an adapter go in a model, and under which drive: every check, and no change."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from lorakit.adapter import Adapter, same_base
from lorakit.attach.slots import Slot, slot_name
from lorakit.describe import Found, is_added, locate, owner_of, parent_of
from lorakit.errors import AdapterError, BaseMismatchError, listed, nearest
from lorakit.method import METHODS, not_called
from lorakit.quantize import quantized_as
from lorakit.reading import known_by
from lorakit.update import AdaptedLayer, LayerSpec

DRIVES = ("hook", "fused", "weight")


class Place(NamedTuple):
    """Where one layer of an adapter goes."""

    path: str
    owner: nn.Module
    found: Found
    drive: str
    layer: AdaptedLayer


def places_of(
    model: nn.Module,
    adapter: Adapter,
    located: Mapping[str, Found | None],
    inside_torch: set[int],
    drive: str | None,
    own: bool,
) -> list[Place]:
    """Where every layer goes, after every check that needs no change."""
    places: list[Place] = []
    faults: list[str] = []
    n_absent = 0
    for path, layer in adapter.layers.items():
        found = located[path]
        if found is None:
            n_absent += 1
            faults.append(f"the model has no layer '{path}' that can be adapted")
            continue
        host = path.rpartition(".")[0] if found.kind.name == "parameter" else path
        owner = owner_of(model, found.module, host)
        if drive == "weight" and owner is found.module and found.kind.name != "parameter":
            owner = parent_of(model, path)  # whoever demands this drive says that the weight is read from outside
        wrong = ([] if own else _misfits(layer, found.spec)) + _cannot(drive, found, owner)
        taken = drive or _drive(found, owner, inside_torch)
        if taken == "weight" and not METHODS[layer.method].linear:
            wrong.append(not_called(path, layer.method))
        if wrong:
            faults += wrong
            continue
        places.append(Place(path, owner, found, taken, layer))
    if adapter.layers and n_absent == len(adapter.layers):
        raise AdapterError(
            f"none of the adapter's {len(adapter.layers)} layers is in this {type(model).__name__}, "
            f"e.g. '{next(iter(adapter.layers))}'; it was made for {adapter.base_name or 'another architecture'}"
        )
    if faults:
        raise AdapterError(f"the adapter{made_on(adapter)} does not fit this {type(model).__name__}: {listed(faults)}")
    return places


def made_on(adapter: Adapter) -> str:
    """Which base it was made on, to stand behind its name; "" where it does not say."""
    return f" (made on '{adapter.base_name}')" if adapter.base_name else ""


def _misfits(layer: AdaptedLayer, spec: LayerSpec) -> list[str]:
    """Why a layer of the adapter cannot go here."""
    families = {"linear", "hf_conv1d"}
    if layer.kind != spec.kind and not {layer.kind, spec.kind} <= families and layer.kind != "":
        return [f"'{spec.path}' is of kind {spec.kind}; the adapter has {layer.kind} there"]
    method = METHODS[layer.method]
    wanted = method.expected(spec, layer)
    faults = [f"'{spec.path}' lacks factor '{name}'" for name in wanted if name not in layer.factors]
    if ("a0" in layer.factors) != ("b0" in layer.factors):
        faults.append(f"'{spec.path}' has only one of the factors 'a0' and 'b0'")
    known = {**wanted, **method.optional_shapes(spec, layer.rank)}
    faults += [
        f"'{spec.path}' has a factor '{name}' that method '{layer.method}' does not know{nearest(name, known)}"
        for name in layer.factors
        if name not in known
    ]
    for name, shape in known.items():
        factor = layer.factors.get(name)
        if factor is not None and tuple(factor.shape) != shape:
            o, i = spec.matrix
            faults.append(f"'{spec.path}' ({o} x {i}): factor '{name}' is {tuple(factor.shape)}; it must be {shape}")
    return faults


def _cannot(drive: str | None, found: Found, owner: nn.Module) -> list[str]:
    """Why a demanded drive is impossible here, and what attach would do if it were not stopped."""
    path, module = found.spec.path, found.module
    faults: list[str] = []
    child = module._modules.get(slot_name(found.parameter))
    if drive is None and child is None:
        return faults
    if drive in ("hook", "fused") and (owner is not module or found.kind.name == "parameter"):
        faults.append(f"the weight of '{path}' is read without calling a layer, which drive='{drive}' would never see")
    elif drive == "fused" and not (found.kind.fusable and found.kind.plain(module)):
        faults.append(f"'{path}' ({type(module).__name__}, kind {found.kind.name}) has no fused forward")
    elif drive == "hook" and not found.kind.plain(module):
        faults.append(f"'{path}' is a {type(module).__name__}, whose own forward drive='hook' would not follow")
    if isinstance(child, Slot):
        if drive not in (None, child.drive):
            faults.append(f"'{path}' has an adapter under drive='{child.drive}' already, and all take the same")
    elif drive == "fused" and "forward" in module.__dict__:
        faults.append(f"'{path}' has a forward of its own on the instance already; drive='fused' would lose it")
    if child is not None and not is_added(child):
        faults.append(f"'{path}' has a child '{slot_name(found.parameter)}' of its own, which attach would replace")
    return faults


def _drive(found: Found, owner: nn.Module, inside_torch: set[int]) -> str:
    module = found.module
    if owner is not module or not found.kind.plain(module):
        return "weight"
    if not found.kind.fusable or "forward" in module.__dict__ or id(module) in inside_torch:
        return "hook"
    return "fused"


Modules = Iterable[tuple[str, nn.Module]]


def inside_torch_layers(modules: Modules) -> set[int]:
    """torch's own transformer layers look for hooks before they take a fast path past the forward of their layers."""
    kinds = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    return {id(inner) for _, outer in modules if isinstance(outer, kinds) for inner in outer.modules()}


def stand_ins_of(model: nn.Module, adapter: Adapter) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Holder and owner of every fully trained parameter, in the model's order: a checkpoint goes by it."""
    if not adapter.trained:
        return {}
    faults: list[str] = []
    found: dict[str, tuple[nn.Module, nn.Module]] = {}
    order = {name: k for k, (name, _) in enumerate(model.named_parameters(remove_duplicate=False))}
    for name in sorted(adapter.trained, key=lambda name: order.get(name, len(order))):
        tensor, (host, _, leaf) = adapter.trained[name], name.rpartition(".")
        try:
            holder = model.get_submodule(host)
        except AttributeError:
            faults.append(f"the model has no module '{host}', and the adapter trains '{name}' fully; add it first")
            continue
        parameter = holder._parameters.get(leaf)
        if parameter is None:
            faults.append(f"'{host}' has no parameter '{leaf}', and the adapter trains it fully")
        elif parameter.shape != tensor.shape:
            faults.append(f"'{name}' is {tuple(parameter.shape)} in the model and {tuple(tensor.shape)} in the adapter")
        else:
            found[name] = (holder, owner_of(model, holder, host))
    if faults:
        raise AdapterError(f"the adapter{made_on(adapter)} does not fit this {type(model).__name__}: {listed(faults)}")
    return found


def knows(model: nn.Module, adapter: Adapter, located: Mapping[str, Found]) -> bool:
    """Has the model the weights that the adapter was made on, as far as it says? `located` are layers found before."""
    for known in adapter.bases:
        found = {path: located.get(path) or locate(model, path) for path in known.layers}
        weights = [(path, place.numbers) for path, place in found.items() if place is not None]
        if not same_base(known.fingerprint, known_by(model, weights, known.rows)):
            return False
    return True


def check_base_of(model: nn.Module, adapter: Adapter, places: Iterable[Place]) -> None:
    """BaseMismatchError if the model has other weights than those it was made on."""
    if not knows(model, adapter, {place.path: place.found for place in places}):
        how, now = (dict(note) for note in (adapter.meta.get("quantized") or {}, quantized_as(model)))
        if how != now:
            way = f"; it was made on them {_as(how)}, and this model has them {_as(now)}: quantize it likewise"
        else:
            way = "; load that base"
        raise BaseMismatchError(
            f"this adapter{made_on(adapter)} was made for other weights than this {type(model).__name__} has{way}, or "
            "(Python) pass check_base=False if the difference is meant"
        )


def _as(how: Mapping[str, Any]) -> str:
    return f"in {how['form']} (layers {how['layers']}, embeddings {how['embeddings']})" if how else "in float"
