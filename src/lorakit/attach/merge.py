"""Merging: the active adapters written into the base weights, for inference without any extra cost.

Pairs are added in place, block of rows by block of rows: no second dense copy, whatever the precision. The sum of
half-precision weights is computed in float32 and rounded once. Un-merging never subtracts (that would drift): it puts
the kept originals back.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorakit.attach.attach import detach
from lorakit.attach.drives import summed, summed_bias
from lorakit.attach.slots import Slot, WeightReader, home_of, refuse_merged, slots_of, stand_in
from lorakit.describe import locate
from lorakit.errors import AttachError, listed
from lorakit.kinds.parameter import bias_name
from lorakit.linalg import relative_error
from lorakit.update import Update

_BLOCK_NUMBERS = 1 << 19  # numbers of W per block: 2 MB in float32, which stays in a second-level cache


class Rounding(NamedTuple):
    """What rounding a merged weight to few bits has cost: `|W'' - W'| / |W'|` (Frobenius), and the share of the change
    that it made unlike what was merged, `|W'' - W'| / |W' - W|`."""

    of_weight: float
    of_change: float


def merge(
    model: nn.Module, *, keep: bool = False, tied: bool = False, zeros: bool = False, requantize: bool = False
) -> dict[str, Rounding]:
    """Writes the active adapters into the base weights and detaches all adapters: a plain model remains.

    `keep=True` keeps a copy of every changed weight, so that `unmerge` restores the base bit for bit and the adapters
    go on being attached. `tied=True` allows a weight that other layers share (their output changes too). `zeros=True`
    leaves every 0 of a base weight a 0, so that a pruned base stays pruned. `requantize=True` allows weights in few
    bits, which are merged as floats and rounded again; returned is what that cost, for each of their layers. The exact
    way is `dequantize` before attaching.

    Raises AttachError, before anything is changed, for tied weights, weights in few bits, and updates that are not
    finite.
    """
    model, switch = home_of(model)
    refuse_merged(switch)
    if not switch.active:
        raise AttachError("no adapter is active, so there is nothing to merge; activate one first")
    paths = dict.fromkeys(path for name in switch.active for path in switch.names[name])
    trained = dict.fromkeys(full for name in switch.active for full in switch.trained[name])
    if switch.prompts is not None and switch.prompts.acts:
        raise AttachError("a prompt is no change of the weights, so it cannot be merged; keep it as an adapter")
    _check(model, list(paths), list(trained), tied, requantize)
    if keep:
        _refuse_unkept(model, list(paths))
    kept = _Originals() if keep else None
    with torch.no_grad():
        for full_name in trained:
            _write_trained(model, full_name, kept)
        found = {
            slot.path: _write_layer(module, parameter, slot, kept, zeros)
            for module, parameter, slot in slots_of(model, paths)
        }
    if kept is not None:
        switch.merged = (switch.active, kept.weights)
        switch.active = ()
    else:
        detach(model)
    return {path: rounding for path, rounding in found.items() if rounding is not None}


def unmerge(model: nn.Module) -> None:
    """Puts the base weights back that `merge(keep=True)` kept, bit for bit, and lets the adapters act again."""
    model, switch = home_of(model)
    if switch.merged is None:
        raise AttachError("nothing is merged with keep=True in this model, so there is no original to put back")
    active, kept = switch.merged
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, original in kept.items():
            tensors[name].copy_(original)
    switch.merged = None
    switch.active = active


def _check(model: nn.Module, paths: list[str], trained: list[str], tied: bool, requantize: bool) -> None:
    faults: list[str] = [] if tied else _shared(model, paths, trained)
    few = [slot.path for _, _, slot in slots_of(model, paths) if slot.kind.rounds]
    if few and not requantize:
        faults.append(
            f"{len(few)} layers, e.g. '{few[0]}', keep their weights in few bits, to which the sum would be rounded; "
            "dequantize the model before attaching, or pass requantize=True"
        )
    for module, parameter, slot in slots_of(model, paths):
        reader = WeightReader(module, parameter, slot.kind)
        for factors in slot.active():
            update = factors.update(reader)
            if not all(bool(torch.isfinite(part).all()) for _, part in update.parts()):
                faults.append(f"the update of '{slot.path}' has NaN or infinite numbers")
            if not update.is_linear:
                faults.append(f"method '{factors.method.name}' at '{slot.path}' changes outputs, not the weight")
            if update.bias is not None and not bias_name(module, parameter):
                faults.append(f"the update of '{slot.path}' has a bias and the layer has none to merge it into")
    for name in trained:
        if not bool(torch.isfinite(_standing(model, name)).all()):
            faults.append(f"the trained '{name}' has NaN or infinite numbers")
    if faults:
        raise AttachError(f"nothing was merged: {listed(faults)}")


def _refuse_unkept(model: nn.Module, paths: list[str]) -> None:
    """AttachError for layers of other libraries, which keep more of a weight than we know of."""
    for module, parameter, slot in slots_of(model, paths):
        if not slot.kind.tensors(module, parameter):
            raise AttachError(
                f"keep=True cannot put back the weight of '{slot.path}' ({type(module).__name__}); merge a copy of the "
                "model, or leave keep out"
            )


def _shared(model: nn.Module, paths: list[str], trained: list[str]) -> list[str]:
    """Weights that are one tensor in the base and would not be one any more: each place would see all changes."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    faults: list[str] = []
    places = {place.spec.path: place for path in paths if (place := locate(model, path)) is not None}
    changed = {path: id(place.weight) for path, place in places.items()}
    own = {path: f"{path}.{place.parameter}" for path, place in places.items()}
    for path, key in [*changed.items(), *((name, id(stand_in(model, name).base)) for name in trained)]:
        adapted = key in changed.values()
        standing = {id(_standing(model, name)) for name in trained if name in names[key]}
        one_for_all = len(standing) == 1 and set(names[key]) <= set(trained)
        others = [other for other in names[key] if other not in (path, own.get(path))]
        if others and (adapted or not one_for_all):
            faults.append(
                f"'{path}' shares its weight with {', '.join(repr(other) for other in others)}, which would change "
                "too; untie them, or pass tied=True if that is meant"
            )
    return faults


def _standing(model: nn.Module, full_name: str) -> Tensor:
    value = stand_in(model, full_name).trained.active()
    assert value is not None
    return value


class _Originals:
    """Copies of base weights as they were before the first write, each tensor once, under whatever name."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self._seen: set[int] = set()

    def keep(self, name: str, weight: Tensor) -> None:
        if id(weight) not in self._seen:
            self._seen.add(id(weight))
            self.weights[name] = weight.detach().clone()


def _write_trained(model: nn.Module, full_name: str, kept: _Originals | None) -> None:
    base = stand_in(model, full_name).base
    if kept is not None:
        kept.keep(full_name, base)
    base.copy_(_standing(model, full_name))


def _write_layer(
    module: nn.Module, parameter: str, slot: Slot, kept: _Originals | None, zeros: bool
) -> Rounding | None:
    stored = module._parameters[parameter]
    assert stored is not None
    host = slot.path if parameter == "weight" else slot.path.rpartition(".")[0]
    prefix = f"{host}." if host else ""
    reader = WeightReader(module, parameter, slot.kind)
    updates = [factors.update(reader).detached() for factors in slot.active()]
    bias_called = bias_name(module, parameter)
    bias = module._parameters.get(bias_called) if bias_called else None
    changed = summed_bias(bias, updates)
    if kept is not None:
        for name, tensor in slot.kind.tensors(module, parameter).items():
            kept.keep(prefix + name, tensor)
        if changed is not bias and bias is not None:
            kept.keep(prefix + bias_called, bias)
    weight = slot.kind.canonical(module, stored.data)
    before = weight.clone() if slot.kind.rounds else weight
    pruned = weight == 0 if zeros else None
    add_in_place(weight, updates)
    if pruned is not None:
        weight.masked_fill_(pruned, 0)
    if weight.data_ptr() != stored.data_ptr():  # few bits, or a memory format without a canonical view (channels_last)
        slot.kind.write(module, parameter, weight)
    if changed is not bias and bias is not None and changed is not None:
        bias.copy_(changed)
    if not slot.kind.rounds:
        return None
    found = reader()
    return Rounding(relative_error(found, weight), relative_error(found, weight, weight - before))


def add_in_place(weight: Tensor, updates: list[Update]) -> None:
    """Writes the updated canonical weight over `weight` (.., o, i), a view of the stored one."""
    if weight.ndim == 2 and all(update.is_pair for update in updates):
        _add_pairs(weight, updates)
        return
    for block, rows in _blocks(weight):
        wide = block.float() if block.dtype in (torch.bfloat16, torch.float16) else block
        block.copy_(summed(wide, [_rows(update, rows) for update in updates]))


def _add_pairs(weight: Tensor, updates: list[Update]) -> None:
    pairs = [(update.a, update.b, update.scale) for update in updates if update.a is not None and update.b is not None]
    compute = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
    ready = [(a.to(compute), b.to(compute), scale) for a, b, scale in pairs]
    if compute == weight.dtype:
        for a, b, scale in ready:
            weight.addmm_(b, a, alpha=scale)
        return
    wide: Tensor | None = None  # one block in float32, used again for every block
    for block, rows in _blocks(weight):
        if wide is None or wide.shape != block.shape:
            wide = torch.empty(block.shape, dtype=compute, device=block.device)
        wide.copy_(block)
        for a, b, scale in ready:
            wide.addmm_(b[rows], a, alpha=scale)
        block.copy_(wide)


def _blocks(weight: Tensor) -> Iterator[tuple[Tensor, slice]]:
    n_rows = max(1, _BLOCK_NUMBERS // max(1, weight.numel() // weight.shape[-2]))
    for start in range(0, weight.shape[-2], n_rows):
        rows = slice(start, start + n_rows)
        yield weight[..., rows, :], rows


def _rows(update: Update, rows: slice) -> Update:
    """The part of an update that concerns these output rows."""
    return Update(
        a=update.a,
        b=None if update.b is None else update.b[..., rows, :],
        scale=update.scale,
        dense=None if update.dense is None else update.dense[..., rows, :],
        gain=None if update.gain is None else update.gain[..., rows],
        gain_in=update.gain_in,
    )
