"""The one door: attach adapters to a model, and take them away again without a trace."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from lorakit.adapter import Adapter, fingerprint, same_base
from lorakit.attach.drives import add_shadow, drop_shadow, install, remove
from lorakit.attach.fresh import fresh
from lorakit.attach.slots import (
    Factors,
    Slot,
    Switch,
    Trained,
    drop_switch,
    find_home,
    home_of,
    make_switch,
    refuse_merged,
    slot_name,
    slots_of,
    stand_in,
)
from lorakit.describe import Found, is_added, locate, owner_of, parent_of, resolve_trained, walk
from lorakit.errors import AdapterError, AttachError, BaseMismatchError, UsageError, listed, nearest
from lorakit.method import METHODS
from lorakit.plan import Plan
from lorakit.update import AdaptedLayer, LayerSpec

DRIVES = ("hook", "fused", "weight")
_RESERVED = {
    "training",
    "path",
    "parameter",
    "kind",
    "drive",
    "switch",
    "owner",
    *dir(nn.Module),
    *dir(Slot),
    *dir(Trained),
}


class _Place(NamedTuple):
    """Where one layer of an adapter goes."""

    path: str
    owner: nn.Module
    found: Found
    drive: str
    layer: AdaptedLayer


def attach(
    model: nn.Module,
    what: Plan | Adapter,
    *,
    name: str = "default",
    seed: int = 0,
    trainable: bool | None = None,
    drive: str | None = None,
    check_base: bool = True,
) -> tuple[str, ...]:
    """Attaches an adapter to a model in place and makes it the active one; returns the adapted layer paths.

    A Plan brings fresh factors (from `seed`) that learn; an Adapter brings its own, which do not, unless `trainable`.
    Training freezes every base parameter; detaching the last adapter puts their `requires_grad` back. `name` tells
    several adapters apart (`activate` lets more than one act). `drive` overrides the choice of drive, for tests.
    `check_base=False` allows an adapter that was made on other base weights.

    Raises PlanError or AdapterError with every fault, before anything is changed.

    >>> import torch, lorakit as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    >>> lk.attach(model, lk.plan(model, rank=2))
    ('0', '1')
    """
    home = find_home(model)
    model = home or model
    _check_name(home, name)
    if drive is not None and drive not in DRIVES:
        raise UsageError(f"unknown drive '{drive}'{nearest(drive, DRIVES)}")
    if not isinstance(what, Plan | Adapter):
        raise UsageError(f"attach takes a Plan or an Adapter, not {type(what).__name__}")
    if isinstance(what, Plan) and not what.layers and not what.trained:
        raise UsageError("the plan is empty: no layer to adapt and nothing to train; see lorakit.plan")
    found = {path: locate(model, path) for path in what.layers}
    adapter = fresh(model, what, found, seed) if isinstance(what, Plan) else what
    learn = isinstance(what, Plan) if trainable is None else trainable
    modules = list(walk(model))
    own = isinstance(what, Plan)  # fresh factors fit by construction, and nobody else holds them
    places = _places(model, adapter, found, _inside_torch_layers(modules), drive, own)
    stand_ins = _stand_ins(model, adapter)
    if check_base and isinstance(what, Adapter):
        _check_base(model, adapter, places)
    switch = make_switch(model)
    refuse_merged(switch)
    if learn:
        _freeze(modules, switch)
    for place in places:
        _put_layer(place, name, switch, learn, own)
    _put_trained(model, stand_ins, name, adapter, learn)
    _quiet_nested_tensors(modules, switch)
    switch.names[name] = tuple(place.path for place in places)
    switch.trained[name] = tuple(stand_ins)
    switch.meta[name] = adapter.meta
    switch.active = (name,)
    return switch.names[name]


def _check_name(home: nn.Module | None, name: str) -> None:
    if not isinstance(name, str) or not name or "." in name or name in _RESERVED:
        raise UsageError(f"adapter name {name!r} cannot be used; take a plain word without dots")
    if home is not None and name in make_switch(home).names:
        raise AttachError(f"an adapter named '{name}' is attached already; choose another name, or detach it first")


def _places(
    model: nn.Module,
    adapter: Adapter,
    located: Mapping[str, Found | None],
    inside_torch: set[int],
    drive: str | None,
    own: bool,
) -> list[_Place]:
    """Where every layer goes, after every check that needs no change."""
    places: list[_Place] = []
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
        if wrong:
            faults += wrong
            continue
        places.append(_Place(path, owner, found, drive or _drive(found, owner, inside_torch), layer))
    if adapter.layers and n_absent == len(adapter.layers):
        raise AdapterError(
            f"none of the adapter's {len(adapter.layers)} layers is in this {type(model).__name__}, "
            f"e.g. '{next(iter(adapter.layers))}'; it was made for {adapter.base_name or 'another architecture'}"
        )
    if faults:
        raise AdapterError(f"the adapter does not fit this {type(model).__name__}: {listed(faults)}")
    return places


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


def _inside_torch_layers(modules: Modules) -> set[int]:
    """torch's own transformer layers look for hooks before they take a fast path past the forward of their layers."""
    kinds = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    return {id(inner) for _, outer in modules if isinstance(outer, kinds) for inner in outer.modules()}


def _stand_ins(model: nn.Module, adapter: Adapter) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Holder and owner of every fully trained parameter."""
    if not adapter.trained:
        return {}
    faults: list[str] = []
    found: dict[str, tuple[nn.Module, nn.Module]] = {}
    for name, tensor in adapter.trained.items():
        host, _, leaf = name.rpartition(".")
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
        raise AdapterError(f"the adapter does not fit this {type(model).__name__}: {listed(faults)}")
    return found


def _check_base(model: nn.Module, adapter: Adapter, places: Iterable[_Place]) -> None:
    wanted = adapter.base_fingerprint
    if wanted and not same_base(wanted, fingerprint((place.path, place.found.weight) for place in places)):
        raise BaseMismatchError(
            f"this adapter was made for other weights than this {type(model).__name__} has"
            f"{f' (it was made on {adapter.base_name!r})' if adapter.base_name else ''}; load that base, "
            "or pass check_base=False if the difference is meant (e.g. a quantized base)"
        )


def _freeze(modules: Modules, switch: Switch) -> None:
    if switch.frozen is not None:
        return
    switch.frozen = set()
    for path, module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                switch.frozen.add(f"{path}.{name}" if path else name)
                parameter.requires_grad_(False)


def _put_layer(place: _Place, name: str, switch: Switch, learn: bool, own: bool) -> None:
    module, parameter = place.found.module, place.found.parameter
    child = slot_name(parameter)
    slot = module._modules.get(child)
    if not isinstance(slot, Slot):
        slot = Slot(place.path, parameter, place.found.kind, place.drive, switch, place.owner)
        module._modules[child] = slot
        install(module, slot)
    device = place.found.weight.device
    factors = place.layer.factors
    if not own:  # training must not write into the value that was attached
        factors = {key: factor.detach().to(device, copy=True).contiguous() for key, factor in factors.items()}
    slot._modules[name] = Factors(METHODS[place.layer.method], place.layer, factors, learn, module.training)


def _put_trained(
    model: nn.Module,
    stand_ins: Mapping[str, tuple[nn.Module, nn.Module]],
    name: str,
    adapter: Adapter,
    learn: bool,
) -> None:
    """Stand-ins for whole parameters. What is one tensor in the base (tied weights) gets one stand-in, too."""
    switch = make_switch(model)
    owners: dict[int, Trained] = {}
    for full_name in switch.trained.get(name, ()):
        place = stand_in(model, full_name)
        owners[id(place.base)] = place.trained.lent.get(name, place.trained)
    for full_name, (holder, owner) in stand_ins.items():
        leaf = full_name.rpartition(".")[2]
        trained = holder._modules.get(f"trained_{leaf}")
        if not isinstance(trained, Trained):
            trained = Trained(switch)
            holder.add_module(f"trained_{leaf}", trained)
            add_shadow(owner, holder, leaf, trained)
        base = holder._parameters[leaf]
        assert base is not None
        value = adapter.trained[full_name].detach().to(base.device, base.dtype, copy=True)
        lender = owners.setdefault(id(base), trained)
        standing = lender._parameters.get(name)
        if standing is not None and torch.equal(standing, value):
            trained.lent[name] = lender
        else:
            trained.register_parameter(name, nn.Parameter(value, requires_grad=learn))


def _quiet_nested_tensors(modules: Modules, switch: Switch) -> None:
    """torch's encoder turns padded input into nested tensors for a fast path that adapted layers do not take."""
    if switch.names:
        return
    for path, module in modules:
        if isinstance(module, nn.TransformerEncoder) and getattr(module, "use_nested_tensor", False):
            switch.nested[path] = True
            module.use_nested_tensor = False


def detach(model: nn.Module, name: str | None = None) -> None:
    """Takes one adapter away, or all of them. After the last one the model is what it was, bit for bit.

    Base parameters get the `requires_grad` back that they had before training. No other adapter becomes active by it.
    """
    model, switch = home_of(model)
    refuse_merged(switch)
    if name is not None and name not in switch.names:
        raise AttachError(f"no adapter named '{name}' is attached{nearest(name, switch.names)}")
    for gone in [name] if name is not None else list(switch.names):
        _take_away(model, switch, gone)
    if not switch.names:
        _restore(model, switch)
        drop_switch(model)


def _take_away(model: nn.Module, switch: Switch, name: str) -> None:
    for module, parameter, slot in list(slots_of(model, switch.names[name])):
        del slot._modules[name]
        if not slot._modules:
            remove(module, slot)
            del module._modules[slot_name(parameter)]
    for full_name in switch.trained[name]:
        holder, _, trained = stand_in(model, full_name)
        trained._parameters.pop(name, None)
        trained.lent.pop(name, None)
        if not trained._parameters and not trained.lent:
            host, _, leaf = full_name.rpartition(".")
            drop_shadow(owner_of(model, holder, host), trained)
            del holder._modules[f"trained_{leaf}"]
    for table in (switch.names, switch.trained, switch.meta):
        del table[name]  # type: ignore[attr-defined]
    switch.active = tuple(other for other in switch.active if other != name)


def _restore(model: nn.Module, switch: Switch) -> None:
    for path in switch.nested:
        module: Any = model.get_submodule(path)
        module.use_nested_tensor = True
    if switch.frozen:
        parameters: Mapping[str, nn.Parameter] = dict(model.named_parameters(remove_duplicate=False))
        for name in switch.frozen:
            if name in parameters:
                parameters[name].requires_grad_(True)


def unfreeze(model: nn.Module, name: str, trained: tuple[str, ...]) -> None:
    """Lets more of the model learn under an attached adapter: modules or parameters by name, "*" for the whole base.

    The base itself stays as it is; the adapter carries the trained parameters whole.
    """
    model, switch = home_of(model)
    refuse_merged(switch)
    if name not in switch.names:
        raise AttachError(f"no adapter named '{name}' is attached{nearest(name, switch.names)}")
    parameters = resolve_trained(model, trained)
    adapter = Adapter({}, {key: p.detach() for key, p in parameters.items() if key not in switch.trained[name]})
    _put_trained(model, _stand_ins(model, adapter), name, adapter, True)
    switch.trained[name] = (*switch.trained[name], *adapter.trained)
