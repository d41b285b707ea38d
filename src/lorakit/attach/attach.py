"""The one door: attach adapters to a model, and take them away again without a trace."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapter import Adapter
from lorakit.attach.drives import add_shadow, drop_shadow, install, remove
from lorakit.attach.fresh import fresh
from lorakit.attach.places import DRIVES, Modules, Place, check_base_of, inside_torch_layers, places_of, stand_ins_of
from lorakit.attach.prompts import Prompts, check_prompt, put_prompt, take_prompt
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
from lorakit.describe import locate, owner_of, walk
from lorakit.errors import AttachError, UsageError, nearest
from lorakit.method import METHODS, Measured
from lorakit.plan import Plan
from lorakit.reading import Reading
from lorakit.whole import resolve_trained

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
    *dir(Prompts),
    *Prompts.__annotations__,
}


def attach(
    model: nn.Module,
    what: Plan | Adapter,
    *,
    name: str = "default",
    seed: int = 0,
    trainable: bool | None = None,
    drive: str | None = None,
    check_base: bool = True,
    measured: Mapping[str, Measured] | None = None,
) -> tuple[str, ...]:
    """Attaches an adapter to a model in place and makes it the active one; returns the adapted layer paths.

    A Plan brings fresh factors (from `seed`) that learn; an Adapter brings its own, which do not, unless `trainable`.
    Training freezes every base parameter; detaching the last adapter puts their `requires_grad` back. `name` tells
    several adapters apart (`activate` lets more than one act). `drive` overrides the choice of drive, for tests.
    `check_base=False` allows an adapter that was made on other base weights. `measured` is what `lorakit.measure`
    gives, for a plan whose starts look at data.

    Raises PlanError or AdapterError with every fault, before anything is changed.

    >>> import torch, lorakit as lk
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    >>> lk.attach(model, lk.plan(model, rank=2))
    ('0', '1')
    """
    home = find_home(model)
    model = home or model
    _check_name(home, name)
    if home is not None:
        refuse_merged(make_switch(home))
    if drive is not None and drive not in DRIVES:
        raise UsageError(f"unknown drive '{drive}'{nearest(drive, DRIVES)}")
    if not isinstance(what, Plan | Adapter):
        raise UsageError(f"attach takes a Plan or an Adapter, not {type(what).__name__}")
    if isinstance(what, Plan) and not (what.layers or what.trained or what.prompt):
        raise UsageError("the plan is empty: no layer to adapt and nothing to train; see lorakit.plan")
    found = {path: locate(model, path) for path in what.layers}
    adapter = fresh(model, what, found, seed, measured or {}) if isinstance(what, Plan) else what
    learn = isinstance(what, Plan) if trainable is None else trainable
    modules = list(walk(model))
    own = isinstance(what, Plan)  # fresh factors fit by construction, and nobody else holds them
    places = places_of(model, adapter, found, inside_torch_layers(modules), drive, own)
    stand_ins = stand_ins_of(model, adapter)
    if adapter.prompt is not None and not own:
        check_prompt(model, adapter.prompt, Reading(model, adapter.prompt.inputs).sizes)
    if check_base and isinstance(what, Adapter):
        check_base_of(model, adapter, places)
    switch = make_switch(model)
    if learn:
        _freeze(modules, switch)
    held: dict[int, tuple[Factors, str]] = {}
    for place in places if own else _copied(places):
        _put_layer(place, name, switch, learn, held)
    _put_trained(model, stand_ins, name, adapter, learn)
    _quiet_nested_tensors(modules, switch)
    switch.names[name] = tuple(place.path for place in places)
    switch.trained[name] = tuple(stand_ins)
    switch.meta[name] = adapter.meta
    if adapter.prompt is not None:
        put_prompt(model, switch, name, adapter.prompt, learn)
    switch.active = (name,)
    return switch.names[name]


def _check_name(home: nn.Module | None, name: str) -> None:
    if not isinstance(name, str) or not name or "." in name or name in _RESERVED:
        raise UsageError(f"adapter name {name!r} cannot be used; take a plain word without dots")
    if home is not None and name in make_switch(home).names:
        raise AttachError(f"an adapter named '{name}' is attached already; choose another name, or detach it first")


def _freeze(modules: Modules, switch: Switch) -> None:
    if switch.frozen is not None:
        return
    switch.frozen = set()
    for path, module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                switch.frozen.add(f"{path}.{name}" if path else name)
                parameter.requires_grad_(False)


def _copied(places: Iterable[Place]) -> Iterator[Place]:
    """With factors of their own: training must not write into the value that was attached. One tensor stays one."""
    copies: dict[tuple[int, torch.device], Tensor] = {}
    for place in places:
        device, factors = place.found.weight.device, {}
        for key, factor in place.layer.factors.items():
            one = id(factor), device
            if one not in copies:
                copies[one] = factor.detach().to(device, copy=True).contiguous()
            factors[key] = copies[one]
        yield place._replace(layer=replace(place.layer, factors=factors))


def _put_layer(place: Place, name: str, switch: Switch, learn: bool, held: dict[int, tuple[Factors, str]]) -> None:
    """`held`: of every factor that learns the layer that has it, so far."""
    module, parameter = place.found.module, place.found.parameter
    child = slot_name(parameter)
    slot = module._modules.get(child)
    if not isinstance(slot, Slot):
        slot = Slot(place.path, parameter, place.found.kind, place.drive, switch, place.owner)
        module._modules[child] = slot
        install(module, slot)
    factors = place.layer.factors
    method, spec = METHODS[place.layer.method], place.found.spec
    derived = method.derived(factors, (*spec.batch, *spec.matrix))
    lent = {key: held[id(factor)] for key, factor in factors.items() if id(factor) in held}
    rest = {key: factor for key, factor in factors.items() if key not in lent}
    put = Factors(method, place.layer, rest, derived, lent, learn, module.training)
    held |= {id(factor): (put, key) for key, factor in rest.items() if key not in method.frozen}
    slot._modules[name] = put


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
    take_prompt(model, switch, name)
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
    _put_trained(model, stand_ins_of(model, adapter), name, adapter, True)
    switch.trained[name] = (*switch.trained[name], *adapter.trained)
