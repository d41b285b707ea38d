"""The drives: how an attached update reaches the forward pass. Chosen per layer, undone without a trace.

- hook: a forward hook adds the update to the layer's output. Any layer that is called.
- fused: the layer's forward is replaced on the instance, so that layer and pair run as one (kernels/lora.py).
- weight: while its owner runs, the changed weight stands in the instance's `__dict__` in front of the parameter. For
  weights that are read without a call. The parameter, its name and the type of the module stay what they are.

Several active adapters add up: `W' = W + sum over k of (update_k(W) - W)`. All functions here are at module level, so
that a model with adapters can be pickled and deep-copied.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.attach.slots import Slot, Trained, WeightReader
from lorakit.kernels.lora import lora_linear
from lorakit.kinds import Kind
from lorakit.kinds.parameter import bias_name
from lorakit.update import Update

_SHADOWS = "lorakit_shadows"  # on an owner: list of (holder, parameter name, Slot | Trained)
_HANDLES = "lorakit_handles"


def combined(kind: Kind, module: nn.Module, x: Tensor, y: Tensor, updates: list[Update]) -> Tensor:
    """Output under all updates, from the input and the unchanged output."""
    first = kind.apply(module, x, y, updates[0])
    for update in updates[1:]:
        first = first + (kind.apply(module, x, y, update) - y)
    return first


# ---------------------------------------------------------------- hook


def add_update(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """Forward hook of the hook drive."""
    slot: Slot = module._modules["adapters"]  # type: ignore[assignment]
    active = slot.active()
    if not active:
        return output
    x = args[0] if args else next(iter(kwargs.values()))
    reader = WeightReader(module, slot.parameter, slot.kind)
    return combined(slot.kind, module, x, output, [factors.update(reader) for factors in active])


# ---------------------------------------------------------------- fused


def fused_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Forward of a layer under the fused drive."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    slot: Slot = module._modules["adapters"]  # type: ignore[assignment]
    active = slot.active()
    if not active:
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    if slot.switch.inputs is not None:
        slot.switch.inputs.append((slot, x))
    if slot.group is not None and len(active) == 1 and slot.group.takes(slot, active[0], x):
        return slot.group.run(slot, x)  # type: ignore[no-any-return]
    reader = WeightReader(module, slot.parameter, slot.kind)
    updates = [factors.update(reader) for factors in active]
    if len(updates) == 1 and slot.kind.is_product and _fusable(updates[0], x):
        update = updates[0]
        bias = module.bias if update.bias is None else update.changed_bias(module.bias)  # type: ignore[arg-type]
        return lora_linear(x, reader.operand(), bias, update.a, update.b, update.scale)  # type: ignore[arg-type]
    if len(updates) == 1 and slot.kind.is_product and updates[0].dense is not None:  # one product instead of two
        bias = updates[0].changed_bias(module.bias)  # type: ignore[arg-type]
        return F.linear(x, updates[0].weight(reader()), bias)
    if len(updates) == 1 and updates[0].gain_in is not None:  # one product instead of two
        update = updates[0]
        x = x * update.gain_in.to(x.dtype)  # type: ignore[union-attr]
        rest = replace(update, gain_in=None)
        return slot.kind.apply(module, x, type(module).forward(module, x), rest)
    y = type(module).forward(module, x)
    return combined(slot.kind, module, x, y, updates)


def _fusable(update: Update, x: Tensor) -> bool:
    return (
        update.is_pair
        and not torch.compiler.is_compiling()  # the compiler fuses the plain form itself
        and not torch.is_autocast_enabled(x.device.type)
    )


# ---------------------------------------------------------------- weight


def cast_shadows(owner: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of an owner: puts the changed weights in front of its parameters."""
    _take_shadows(owner)  # an interrupt (Ctrl-C) ends a forward pass without its hooks
    for holder, parameter, source in owner.__dict__[_SHADOWS]:
        if isinstance(source, Trained):
            standing = source.active()
            if standing is not None:
                dtype = holder._parameters[parameter].dtype  # type: ignore[union-attr]
                holder.__dict__[parameter] = standing if standing.dtype == dtype else standing.to(dtype)
        else:
            _cast_updates(holder, parameter, source)
    if isinstance(owner, nn.RNNBase):
        owner.__dict__["_flat_weights"] = [getattr(owner, name, None) for name in owner._flat_weights_names]


def _cast_updates(holder: nn.Module, parameter: str, slot: Slot) -> None:
    active = slot.active()
    if not active:
        return
    reader = WeightReader(holder, parameter, slot.kind)
    weight = reader()
    updates = [factors.update(reader) for factors in active]
    holder.__dict__[parameter] = slot.kind.stored(holder, summed(weight, updates))
    name = bias_name(holder, parameter)
    bias = holder.__dict__.get(name, holder._parameters.get(name)) if name else None
    changed = summed_bias(bias, updates)
    if changed is not bias and name:
        holder.__dict__[name] = changed


def summed(weight: Tensor, updates: list[Update]) -> Tensor:
    """The canonical weight under all updates."""
    result = updates[0].weight(weight)
    for update in updates[1:]:
        result = result + update.delta(weight)
    return result


def summed_bias(bias: Tensor | None, updates: list[Update]) -> Tensor | None:
    """The bias under all updates."""
    if len(updates) == 1:
        return updates[0].changed_bias(bias)
    result = bias
    for update in updates:
        changed = update.changed_bias(bias)
        if changed is None or changed is bias:
            continue
        change = changed if bias is None else changed - bias
        result = change if result is None else result + change
    return result


def lift_shadows(owner: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of an owner, run also after an error: takes the shadows away."""
    _take_shadows(owner)


def _take_shadows(owner: nn.Module) -> None:
    for holder, parameter, source in owner.__dict__[_SHADOWS]:
        if parameter in holder.__dict__:
            del holder.__dict__[parameter]
        name = "" if isinstance(source, Trained) else bias_name(holder, parameter)
        if name and name in holder.__dict__:
            del holder.__dict__[name]
    if isinstance(owner, nn.RNNBase):
        owner.__dict__["_flat_weights"] = [getattr(owner, name, None) for name in owner._flat_weights_names]


# ---------------------------------------------------------------- installing and removing


def install(module: nn.Module, slot: Slot) -> None:
    """Sets the slot's drive up on its module (once per slot)."""
    if slot.drive == "hook":
        # before all other hooks: they see what the changed layer gives, and trained stand-ins are still in place
        handle = module.register_forward_hook(add_update, with_kwargs=True, prepend=True)
        module.__dict__[_HANDLES] = [handle]
    elif slot.drive == "fused":
        module.__dict__["forward"] = partial(fused_forward, module)
    else:
        add_shadow(slot.owner, module, slot.parameter, slot)


def add_shadow(owner: nn.Module, holder: nn.Module, parameter: str, source: Slot | Trained) -> None:
    """Lets `owner` cast one more shadow while it runs. Trained parameters come first: updates build on them."""
    shadows = owner.__dict__.setdefault(_SHADOWS, [])
    entry = (holder, parameter, source)
    if isinstance(source, Trained):
        shadows.insert(0, entry)
    else:
        shadows.append(entry)
    if len(shadows) == 1:
        owner.__dict__[f"{_SHADOWS}_handles"] = [
            owner.register_forward_pre_hook(cast_shadows),
            owner.register_forward_hook(lift_shadows, always_call=True),
        ]


def remove(module: nn.Module, slot: Slot) -> None:
    """Undoes `install`."""
    if slot.drive == "hook":
        for handle in module.__dict__.pop(_HANDLES, []):
            handle.remove()
    elif slot.drive == "fused":
        module.__dict__.pop("forward", None)
    else:
        drop_shadow(slot.owner, slot)


def drop_shadow(owner: nn.Module, source: Slot | Trained) -> None:
    """Undoes `add_shadow`."""
    _take_shadows(owner)
    shadows = [entry for entry in owner.__dict__.get(_SHADOWS, []) if entry[2] is not source]
    owner.__dict__[_SHADOWS] = shadows
    if not shadows:
        for handle in owner.__dict__.pop(f"{_SHADOWS}_handles", []):
            handle.remove()
        owner.__dict__.pop(_SHADOWS, None)
